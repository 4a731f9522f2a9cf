"""Measures the memory in which `megatron-lion prepare` encodes one text file of the size of WikiText-103.

    python benchmarks/long_text_memory.py --input FILE.txt --tokenizer PATH [--megabytes 540] [--output RESULT.json]

The file is repeated until it has the requested size. Each row is a separate `prepare` with one worker; the peak is that
of its largest process (ru_maxrss). MB are 10^6 bytes. The token files of both encoders must have the same SHA-256. The
tokenizer must allow encoding in parts (docs/data.md), as GPT-2's does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import heading, surroundings

from megatron_lion.files import sha256_file

RUN = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "megatron_lion", "prepare", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def measure(source: Path, tokenizer: Path, megabytes: list[float]) -> list[dict[str, Any]]:
    """Prepares the text at each size (in MB) with each encoder; returns one row for each run."""
    encoders = ["tokenizers", *(["gigatoken"] if importlib.util.find_spec("gigatoken") else [])]
    rows: list[dict[str, Any]] = []
    content = source.read_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in megabytes:
            text = folder / "text.txt"
            with open(text, "wb") as stream:
                while stream.tell() < size * 1e6:
                    stream.write(content)
            found = set()
            for encoder in encoders:
                output = folder / encoder
                options = ["--tokenizer", str(tokenizer), "--encoder", encoder, "--workers", "1", "--split", "1"]
                words = [
                    sys.executable,
                    "-c",
                    RUN,
                    "--input",
                    str(text),
                    "--output",
                    str(output),
                    "--overwrite",
                    *options,
                ]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found.add(sha256_file(output / "train_text_document.bin"))
                rows.append({"encoder": encoder, "text_mb": round(text.stat().st_size / 1e6, 1),
                             "peak_mb": round(int(done.stdout.split()[-1]) * 1024 / 1e6)})  # fmt: skip
            if len(found) > 1:
                sys.exit("the encoders gave different token files")
    return rows


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10.0, 540.0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    facts = surroundings("cpu")
    rows = measure(args.input, args.tokenizer, args.megabytes)
    print(heading(facts))
    for row in rows:
        print(f"{row['encoder']:10} {row['text_mb']:8.1f} MB of text  {row['peak_mb']:5} MB of memory")
    if args.output:
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
