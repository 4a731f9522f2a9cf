"""Measures BERT's data loading: the time of a sample with each kind of masks, and what opening many sentences costs.

    python benchmarks/bert_loading.py --input FILE… --vocab vocab.txt [--sentences 10000000] [--output benchmarks/results/NAME]

Samples: processor time in one process, the two kinds in turn, over samples of 512 tokens of the given text (JSON lines). The
text of each sample must be the same with both; only the masks differ. Opening: the checks of an index of random sentences, and
the largest growth of resident anonymous memory meanwhile (Linux), which mapped files do not count in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 512
ROUNDS, IN_A_ROUND = 15, 200


def open_datasets(folder: Path) -> dict[str, Any]:
    """The training samples of a dataset folder with each kind of masks."""
    from megatron_lion.config import DataConfig, ModelConfig
    from megatron_lion.data.corpora import open_corpora
    from megatron_lion.data.datasets import build_datasets
    from megatron_lion.device import Device
    from megatron_lion.parallel import process_groups

    model = ModelConfig(kind="bert", seq_length=SEQ_LENGTH)
    found = {}
    with process_groups(Device("cpu", 0, "gloo")):
        for name in ("megatron", "vectorized"):
            corpora = open_corpora(DataConfig(path=[str(folder)], masking=name), model)
            sizes = (ROUNDS * IN_A_ROUND, 0, 0)
            found[name] = build_datasets(corpora, model, sizes, seed=7, cache=folder / "cache")[0]
    return found


def original(sample: dict[str, Any]) -> list[int]:
    """The ids of a sample before masking."""
    used = sample["loss_mask"] > 0
    sample["tokens"][sample["positions"][used]] = sample["labels"][used]
    return list(sample["tokens"])


def time_samples(datasets: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of a sample, by kind of masks: one number a round."""
    found: dict[str, list[float]] = {name: [] for name in datasets}
    for number in range(ROUNDS):
        names = list(datasets) if number % 2 else list(reversed(datasets))
        for name in names:
            began = time.process_time()
            for sample in range(number * IN_A_ROUND, (number + 1) * IN_A_ROUND):
                datasets[name][sample]
            found[name].append((time.process_time() - began) / IN_A_ROUND * 1e3)
    for sample in range(IN_A_ROUND):
        texts = [original(dataset[sample]) for dataset in datasets.values()]
        assert texts[0] == texts[1], f"sample {sample} has another text"
    return found


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def open_sentences(folder: Path, sentences: int) -> dict[str, float]:
    """Seconds and memory of checking an index of which no document can be used, so that all of it is read."""
    from megatron_lion.data.bert_datasets import check_sentences
    from megatron_lion.data.indexed_check import check_indexed
    from megatron_lion.errors import DataError

    lengths = np.random.default_rng(0).integers(10, 35, sentences).astype("<i4")
    lengths[::25] = 600
    ends = np.cumsum(lengths, dtype=np.int64)
    boundaries = np.append(np.arange(0, sentences, 25), sentences).astype("<i8")
    with open(folder / "a.idx", "wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sentences, boundaries.size))
        for array in (lengths, 2 * (ends - lengths), boundaries):
            array.tofile(stream)
    (folder / "a.bin").touch()
    os.truncate(folder / "a.bin", 2 * int(ends[-1]))  # sparse
    del lengths, ends, boundaries, array
    before, most, is_done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.001):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    times = [time.perf_counter()]
    info = check_indexed(folder / "a")
    times.append(time.perf_counter())
    try:
        check_sentences(info, 0.0, 1.0)
    except DataError:
        times.append(time.perf_counter())
    is_done.set()
    watcher.join()
    return {"MB": (most[0] - before) / 1e6, "index_s": times[1] - times[0], "sentences_s": times[2] - times[1]}


def table(samples: dict[str, list[float]], opening: dict[str, float], sentences: int) -> str:
    """The measurements as Markdown."""
    from megatron_lion.compare.table import markdown_grid

    body = []
    for name, times in samples.items():
        middle = statistics.median(times)
        body.append([name, f"{middle:.2f} ({min(times):.2f} to {max(times):.2f})", f"{SEQ_LENGTH / middle * 1e3:,.0f}"])
    columns = [
        "masks",
        f"ms of a sample of {SEQ_LENGTH} tokens: median (least to most of {ROUNDS} rounds)",
        "tokens a core-second",
    ]
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {date.today()}; load average "
        f"{os.getloadavg()[0]:.1f} at the end.", "",
        markdown_grid(columns, body, "lrr").rstrip(),
    ]  # fmt: skip
    ratios = [one / other for one, other in zip(samples["megatron"], samples["vectorized"], strict=True)]
    lines += [
        "",
        f"Of a round, megatron took {statistics.median(ratios):.1f} times as long ({min(ratios):.1f} to {max(ratios):.1f}).", "",
        f"An index of {sentences:,} sentences: anonymous memory grew by {opening['MB']:.1f} MB; checked in {opening['index_s']:.2f} s, "
        f"and its documents in {opening['sentences_s']:.2f} s.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines with a text field")
    parser.add_argument("--vocab", type=Path, required=True, help="vocab.txt of BERT")
    parser.add_argument("--sentences", type=int, default=10_000_000, help="sentences of the index that is opened")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    from megatron_lion.prepare.options import PrepareOptions
    from megatron_lion.prepare.pipeline import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opening = open_sentences(folder, args.sentences)
        data = folder / "data"
        prepare(PrepareOptions(inputs=args.input, tokenizer=args.vocab, output=data, task="bert", split="98,1,1"))
        samples = time_samples(open_datasets(data))
    text = table(samples, opening, args.sentences)
    print(text, end="")
    if args.output is not None:
        content = {"samples_ms": samples, "opening": opening, "sentences": args.sentences}
        args.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
