"""Runs `megatron-lion prepare` on a corpus of a given size: speed, memory, kills, and equal bytes at any number of workers.

    python benchmarks/prepare_at_size.py --input FILE… --tokenizer PATH --decontaminate FILE…
        [--megabytes 1000] [--rounds 3] [--output benchmarks/results/prepare_at_size]

The corpus is assembled from the paragraphs of the input: each document is a random choice of them, so that it is distinct
from all others, and every fiftieth repeats an earlier one. All of it is deterministic. Rows, each a command in a process of
its own:

- a loop over single documents, as Megatron-LM's preprocess_data works: json.loads, encode, IndexedDatasetBuilder; on the
  first part of the corpus, and without the time of its imports, which the rows of prepare include;
- prepare on the same part with `--encoder tokenizers`, with 1 and 2 workers; the token file must equal the loop's;
- prepare --deduplicate with 1, 2 and 3 workers; on a fifth and on a tenth of the corpus; with --decontaminate; and with 2
  workers, killed with SIGKILL three times on the way. All token files and counts of the whole corpus must be equal;
- the rules for as many documents as OpenWebText has, whose shards have random hashes: their memory.

All rows are measured one after another in each round. The peak is that of the largest process. MB are 10^6 bytes of text,
core seconds include those of all workers. Python's compiled files are kept between the commands, as in an installation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import heading, surroundings, write_results

from megatron_lion.compare.table import markdown_grid
from megatron_lion.files import sha256_file
from megatron_lion.prepare.pieces import read_documents
from megatron_lion.prepare.workfolder import work_folder

KILLS = (0.2, 0.45, 0.7)
"""Shares of the pieces that are encoded when the command is killed."""
REPEATED = 50
LOOP = """
import json, sys
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron_lion.data.tokenizers import load_tokenizer
source, tokenizer, prefix = sys.argv[1:]
loaded = load_tokenizer(tokenizer)
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(loaded.vocab_size))
with open(source, encoding="utf-8") as stream:
    for line in stream:
        ids = [*loaded.encode(json.loads(line)["text"]), loaded.eod_id]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
builder.finalize(prefix + ".idx")
"""
OPENWEBTEXT_DOCUMENTS = 8_013_769
SELECT = """
import sys
from pathlib import Path
import numpy as np
from megatron_lion.prepare.kept_documents import Rules, select_documents
from megatron_lion.prepare.merge_shards import splits_of_documents
from megatron_lion.prepare.pieces import ReadCount
from megatron_lion.prepare.shards import EncodedShard
folder, documents, draw, shards = Path(sys.argv[1]), int(sys.argv[2]), np.random.default_rng(0), []
for first in range(0, documents, 3340):
    count = min(3340, documents - first)
    hashes = draw.integers(0, 1 << 64, (2, count), dtype=np.uint64)
    hashes[:, :60] = hashes[:, 60:120]
    parts = np.full(count, 1100, "<i4"), hashes, np.full(count, 5000, "<i8")
    (folder / f"{first}.documents").write_bytes(b"".join(part.tobytes() for part in parts))
    shards.append(EncodedShard(name=f"{first}", documents=count, tokens=1100 * count, text_bytes=5000 * count, tokens_sha256="",
                               documents_sha256="", read=ReadCount()))
if len(sys.argv) == 3:
    selection = select_documents(shards, folder, Rules(deduplicate=True), 1)
    splits_of_documents(shards, folder, (99.9, 0.05, 0.05), selection, divided=False)
"""
MEASURE = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
sys.stderr.buffer.write(done.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(done.returncode)
"""


def documents(paragraphs: list[str]) -> Iterator[str]:
    """Yields documents of 2 to 30 random paragraphs without end; every fiftieth repeats an earlier one."""
    draw = random.Random(0)
    recent: list[str] = []
    while True:
        text = "\n\n".join(draw.choices(paragraphs, k=draw.randint(2, 30)))
        recent = [*recent[-REPEATED:], text]
        yield text
        if draw.randrange(REPEATED) == 0:
            yield draw.choice(recent)


def write_corpus(inputs: list[str], path: Path, megabytes: float, part: Path, part_megabytes: float) -> tuple[int, int]:
    """Writes the corpus as JSON lines, and its first part to another file; returns the bytes of text of both."""
    paragraphs = [one for text in read_documents(inputs) for one in text.split("\n") if len(one) > 60]
    size = part_size = 0
    with open(path, "w", encoding="utf-8") as whole, open(part, "w", encoding="utf-8") as beginning:
        for text in documents(paragraphs):
            line = json.dumps({"text": text}) + "\n"
            whole.write(line)
            if size < part_megabytes * 1e6:
                beginning.write(line)
                part_size += len(text.encode())
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return size, part_size
    raise AssertionError("documents never end")


def command(source: Path, output: Path, args: argparse.Namespace, workers: int, *more: str) -> list[str]:
    """Returns the words of a `prepare` command."""
    words = ["--input", source, "--tokenizer", args.tokenizer, "--output", output, "--workers", workers, *more]
    return [sys.executable, "-m", "megatron_lion", "prepare", *map(str, words)]


def measured(words: list[str]) -> dict[str, float]:
    """Runs a command; returns its wall and core seconds and the peak of its largest process."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], stdout=subprocess.PIPE, text=True, check=True)
    peak, core_seconds = done.stdout.split()
    return {
        "seconds": time.perf_counter() - began, "core_seconds": float(core_seconds), "peak_mb": int(peak) * 1024 / 1e6,
    }  # fmt: skip


def killed(words: list[str], output: Path, pieces: int) -> None:
    """Runs a command and kills it and its workers once for each entry of `KILLS`."""
    for share in KILLS:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list(work_folder(output).glob("shards-*/*.json"))) < share * pieces and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            sys.exit("the command ended before it was killed; give a larger --megabytes")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def content(output: Path) -> dict[str, Any]:
    """Returns what must be equal: the hash of each token file, and the manifest's counts."""
    manifest = json.loads((output / "manifest.json").read_text())
    hashes = {path.name: sha256_file(path) for path in sorted(output.glob("*_text_document.*"))}
    return {**hashes, **{key: manifest[key] for key in ("documents", "tokens", "dropped", "text_bytes")}}


def run_round(args: argparse.Namespace, folder: Path, text_mb: dict[str, float], number: int) -> list[dict[str, Any]]:
    """Measures each row once; ends the benchmark if two results differ that must be equal."""
    rows: list[dict[str, Any]] = []

    def row(what: str, workers: int, source: str, words: list[str]) -> None:
        rows.append({"what": what, "workers": workers, "text_mb": text_mb[source], **measured(words)})

    def prepare(what: str, workers: int, source: str, name: str, *more: str) -> Path:
        output = folder / f"{name}{number}"
        row(what, workers, source, command(folder / f"{source}.jsonl", output, args, workers, *more))
        return output

    loop = [str(folder / "part.jsonl"), str(args.tokenizer), str(folder / "loop")]
    row("one document at a time", 1, "part", [sys.executable, "-c", LOOP, *loop])
    started = measured([sys.executable, "-c", LOOP, str(folder / "empty.jsonl"), *loop[1:2], str(folder / "empty")])
    for key in ("seconds", "core_seconds"):
        rows[0][key] -= started[key]
    for workers in (1, 2):
        more = ("--encoder", "tokenizers", "--split", "1")
        output = prepare("prepare --encoder tokenizers", workers, "part", f"part{workers}-", *more)
        if sha256_file(output / "train_text_document.bin") != sha256_file(folder / "loop.bin"):
            sys.exit("the token file differs from the loop's")
    found = {}
    for workers in (1, 2, 3):
        output = prepare("prepare --deduplicate", workers, "all", f"workers{workers}-", "--deduplicate")
        found[f"{workers} workers"] = content(output)
        shutil.rmtree(output)
    for share, source in (("a fifth", "fifth"), ("a tenth", "tenth")):
        prepare(f"prepare --deduplicate, {share} of the text", 1, source, source, "--deduplicate")
    more = ("--deduplicate", "--decontaminate", *map(str, args.decontaminate))
    output = prepare("prepare --deduplicate --decontaminate", 1, "all", "searched", *more)
    found["--decontaminate"] = content(output)
    shutil.rmtree(output)
    if number == 0:
        output = folder / "killed"
        words = command(folder / "all.jsonl", output, args, 2, "--deduplicate")
        # Pieces are cut at a power of two of bytes, about 64 of them, of at most 16 MiB.
        stored = (folder / "all.jsonl").stat().st_size
        killed(words, output, -(-stored // min(max(1 << (stored // 64).bit_length(), 1 << 18), 1 << 24)))
        measured(words)
        found["2 workers, killed three times"] = content(output)
    if different := [what for what, one in found.items() if one != found["1 workers"]]:
        sys.exit(f"the result differs: {', '.join(different)}")
    for one in rows:
        one["mb_per_core_s"] = one["text_mb"] / one["core_seconds"]
        one["over_loop"] = one["mb_per_core_s"] / rows[0]["mb_per_core_s"]
    return rows


def selection_memory(folder: Path) -> dict[str, float]:
    """Peak in MB of a process that applies the rules to as many documents as OpenWebText has, and of one that does not."""
    (folder / "shards").mkdir()
    words = [sys.executable, "-c", SELECT, str(folder / "shards"), str(OPENWEBTEXT_DOCUMENTS)]
    return {"peak_mb": measured(words)["peak_mb"], "without_mb": measured([*words, "no rules"])["peak_mb"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns, for each row, the median and the range over them."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sizes = {}
        for source, share in (("fifth", 5), ("tenth", 10), ("all", 1)):
            megabytes = args.megabytes / share
            sizes[source], sizes["part"] = write_corpus(
                args.input, folder / f"{source}.jsonl", megabytes, folder / "part.jsonl", args.loop_megabytes
            )
        (folder / "empty.jsonl").write_text("")
        text_mb = {source: size / 1e6 for source, size in sizes.items()}
        measured(command(folder / "tenth.jsonl", folder / "first", args, 1))  # compiles and reads what all rows need
        rounds = [run_round(args, folder, text_mb, number) for number in range(args.rounds)]
        memory = selection_memory(folder)
    rows = []
    for several in zip(*rounds, strict=True):
        row = {key: several[0][key] for key in ("what", "workers", "text_mb")}
        for key in ("seconds", "core_seconds", "mb_per_core_s", "over_loop", "peak_mb"):
            values = sorted(one[key] for one in several)
            row |= {key: statistics.median(values), f"{key}_range": [values[0], values[-1]]}
        rows.append(row)
    return {"rounds": args.rounds, "rows": rows, "documents": OPENWEBTEXT_DOCUMENTS, "selection": memory}


def shown(row: dict[str, Any], key: str, form: str) -> str:
    """The median of a row, and its range in brackets."""
    low, high = (format(value, form) for value in row[f"{key}_range"])
    return f"{row[key]:{form}} ({low}–{high})"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="texts whose paragraphs are used")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--decontaminate", type=Path, nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop-megabytes", type=float, default=20, help="size of the part for the loop")
    parser.add_argument("--folder", type=Path, help="folder for the files, which are removed; default: the system's")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: every busy core is one process of this benchmark
    facts = surroundings("cpu")
    found = measure(args)
    body = [
        [row["what"], str(row["workers"]), f"{row['text_mb']:,.0f}", shown(row, "seconds", ".1f"),
         shown(row, "mb_per_core_s", ".1f"), shown(row, "over_loop", ".1f"), f"{row['peak_mb_range'][1]:,.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    columns = ["", "workers", "MB", "wall s", "MB/core s", "× the loop", "peak MB"]
    memory = found["selection"]
    lines = [
        heading(facts),
        "",
        f"Median and range of {found['rounds']} rounds; the largest peak.",
        "",
        markdown_grid(columns, body, "lrrrrrr").rstrip(),
        "",
        "Equal results of the whole corpus: 1, 2 and 3 workers; --decontaminate; 2 workers, killed three times. Equal token files of "
        "the first part: the loop, and --encoder tokenizers.",
        "",
        f"The rules for {found['documents']:,} documents with --deduplicate, and their splits: "
        f"{memory['peak_mb']:.0f} MB; without: {memory['without_mb']:.0f} MB.",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    write_results(args.output, "prepare on a large corpus", text, {**facts, **found})


if __name__ == "__main__":
    main()
