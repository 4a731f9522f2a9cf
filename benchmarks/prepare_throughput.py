"""Compares the speed of `megatron-lion prepare` with Megatron-LM's way of one document at a time.

    python benchmarks/prepare_throughput.py --input FILE… --tokenizer PATH [--workers 2] [--output RESULT.json]

One run on one machine: (1) the baseline on one core: json.loads, encode one text, IndexedDatasetBuilder.add_document;
(2) prepare on one process with `tokenizers`, and with gigatoken if it is installed; (3) the same on several
processes. MB are 10^6 bytes of UTF-8 text. Times are of the whole call, including hashing, process start and writing.
Rates are per second of wall time and per second of processor time; on a shared machine only the second is meaningful.
The token files of all variants are compared byte by byte. The input is JSON lines with a `text` field.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: every busy core is one process of this benchmark


class Clock:
    """Seconds since its creation: (wall time, processor time including that of ended children)."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def read(self) -> tuple[float, float]:
        now = self._now()
        return now[0] - self._began[0], now[1] - self._began[1]


def baseline(files: list[Path], tokenizer: Path, prefix: Path) -> tuple[float, float]:
    """Encodes like a worker of preprocess_data, on one core."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_lion.data.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    clock = Clock()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(loaded.vocab_size))
    for path in files:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                ids = [*loaded.encode(json.loads(line)["text"]), loaded.eod_id]
                builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return clock.read()


def identical(first: Path, second: Path, ending: str) -> bool:
    """Whether the files of two prefixes with this ending have the same bytes."""
    return Path(f"{first}{ending}").read_bytes() == Path(f"{second}{ending}").read_bytes()


def token_hash(prefix: Path) -> str:
    """One hash over both token files."""
    return hashlib.sha256(Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()).hexdigest()


def measure(files: list[Path], tokenizer: Path, workers: int) -> dict[str, object]:
    """Runs all variants, each into a new folder."""
    from megatron_lion.prepare.pipeline import PrepareOptions, prepare

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = baseline(files, tokenizer, folder / "baseline")
        expected = token_hash(folder / "baseline")
        found: list[tuple[str, int, float, float]] = [("one document at a time (baseline)", 1, *times)]
        encoders = ["tokenizers", *(["gigatoken"] if importlib.util.find_spec("gigatoken") else [])]
        text_bytes = 0
        for encoder in encoders:
            for number in sorted({1, workers}):
                output = folder / f"{encoder}{number}"
                options = PrepareOptions(
                    inputs=files, tokenizer=tokenizer, output=output, split="1", workers=number, encoder=encoder
                )  # fmt: skip
                clock = Clock()
                manifest = prepare(options)
                found.append((f"prepare, {manifest.encoder}", number, *clock.read()))
                text_bytes = manifest.text_bytes
                if token_hash(output / "train_text_document") != expected:
                    sys.exit(f"{encoder} with {number} processes: token files differ from the baseline's")
    for what, processes, seconds, core_seconds in found:
        rows.append({"what": what, "processes": processes, "seconds": round(seconds, 2),
                     "core_seconds": round(core_seconds, 2), "mb_per_s": round(text_bytes / 1e6 / seconds, 2),
                     "mb_per_core_s": round(text_bytes / 1e6 / core_seconds, 2),
                     "per_core_over_baseline": round(found[0][3] / core_seconds, 2)})  # fmt: skip
    return {
        "date": date.today().isoformat(), "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(), "text_bytes": text_bytes, "byte_identical": True, "rows": rows,
        "load_average_1min_at_end": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = measure(args.input, args.tokenizer, args.workers)
    for row in result["rows"]:
        print(f"{row['what']:36} {row['processes']} process(es) {row['seconds']:8.2f} s {row['mb_per_s']:8.2f} MB/s "
              f"{row['mb_per_core_s']:8.2f} MB/core-s  x{row['per_core_over_baseline']:.1f} a core")  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
