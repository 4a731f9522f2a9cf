"""Runs `megatron-lion prepare` on a corpus of a given size: speed, memory, kills, and equal bytes at any number of workers.

    python benchmarks/prepare_at_size.py --input FILE… --tokenizer PATH --decontaminate FILE…
        [--megabytes 1000] [--output benchmarks/results/prepare_at_size]

The corpus is assembled from the paragraphs of the input: each document is a random choice of them, so that it is distinct
from all others, and every fiftieth repeats an earlier one. All of it is deterministic. Rows, each a command in a process of
its own, with deduplication on:

- a loop over single documents, as Megatron-LM's preprocess_data works: json.loads, encode, IndexedDatasetBuilder; on the
  first part of the corpus;
- prepare with 1, 2 and 3 workers; with 2 workers, killed with SIGKILL three times on the way; on a tenth of the corpus, for
  its memory; and with --decontaminate.

All token files and their manifests' counts must be equal (but those of the tenth). The peak is that of the largest process.
MB are 10^6 bytes of text, core seconds include those of all workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
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
    words = [
        "--input",
        source,
        "--tokenizer",
        args.tokenizer,
        "--output",
        output,
        "--workers",
        workers,
        "--deduplicate",
    ]
    return [sys.executable, "-m", "megatron_lion", "prepare", *map(str, words), *more]


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rows; ends the benchmark if two differ."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size, part_size = write_corpus(
            args.input, folder / "all.jsonl", args.megabytes, folder / "part.jsonl", args.loop_megabytes
        )
        tenth, _ = write_corpus(args.input, folder / "tenth.jsonl", args.megabytes / 10, folder / "unused.jsonl", 0)
        loop = [sys.executable, "-c", LOOP, str(folder / "part.jsonl"), str(args.tokenizer), str(folder / "loop")]
        rows = [{"what": "one document at a time", "workers": 1, "text_mb": part_size / 1e6, **measured(loop)}]
        found = {}
        for workers in (1, 2, 3):
            output = folder / f"workers{workers}"
            row = measured(command(folder / "all.jsonl", output, args, workers))
            rows.append({"what": "prepare", "workers": workers, "text_mb": size / 1e6, **row})
            found[f"{workers} workers"] = content(output)
        row = measured(command(folder / "tenth.jsonl", folder / "tenth", args, 1))
        rows.append({"what": "prepare, a tenth", "workers": 1, "text_mb": tenth / 1e6, **row})
        given = ["--decontaminate", *map(str, args.decontaminate)]
        row = measured(command(folder / "all.jsonl", folder / "searched", args, 1, *given))
        rows.append({"what": "prepare --decontaminate", "workers": 1, "text_mb": size / 1e6, **row})
        found["decontaminate"] = content(folder / "searched")
        overlaps = json.loads((folder / "searched/manifest.json").read_text())["overlaps"]
        words = command(folder / "all.jsonl", folder / "killed", args, 2)
        # Pieces are cut at a power of two of bytes, about 64 of them, of at most 16 MiB.
        stored = (folder / "all.jsonl").stat().st_size
        killed(words, folder / "killed", -(-stored // min(max(1 << (stored // 64).bit_length(), 1 << 18), 1 << 24)))
        measured(words)
        found["2 workers, killed three times"] = content(folder / "killed")
    different = [what for what, one in found.items() if one != found["1 workers"]]
    if different:
        sys.exit(f"the result differs: {', '.join(different)}")
    for row in rows:
        row["mb_per_core_s"] = row["text_mb"] / row["core_seconds"]
        row["over_loop"] = row["mb_per_core_s"] / rows[0]["mb_per_core_s"]
    shown = {one["path"].rsplit("/", 1)[-1]: one["train_ngrams"] for one in overlaps}
    return {"rows": rows, "equal": list(found), "result": found["1 workers"], "train_ngrams": shown}


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="texts whose paragraphs are used")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--decontaminate", type=Path, nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--loop-megabytes", type=float, default=20, help="size of the part for the loop")
    parser.add_argument("--folder", type=Path, help="folder for the files, which are removed; default: the system's")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: every busy core is one process of this benchmark
    facts = surroundings("cpu")
    found = measure(args)
    body = [
        [row["what"], str(row["workers"]), f"{row['text_mb']:,.0f}", f"{row['seconds']:.1f}", f"{row['core_seconds']:.1f}",
         f"{row['mb_per_core_s']:.1f}", f"{row['over_loop']:.1f}", f"{row['peak_mb']:,.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    columns = ["", "workers", "MB", "wall s", "core s", "MB/core s", "× the loop", "peak MB"]
    lines = [
        heading(facts),
        "",
        markdown_grid(columns, body, "lrrrrrrr").rstrip(),
        "",
        f"Equal results: {'; '.join(found['equal'])}.",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    write_results(args.output, "prepare on a large corpus", text, {**facts, **found})


if __name__ == "__main__":
    main()
