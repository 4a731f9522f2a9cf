"""Makes the dataset of the GPU check's stage `run`: real text (this machine's Python documentation), token by token.

    python benchmarks/gpu_data.py wheels/gpu_data

The folder appears whole or not at all. It holds about 0.8 M tokens of an 8,192-id vocabulary, made in ten seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from data_prep.demo_corpus import build_demo_corpus
from data_prep.options import PrepareOptions
from data_prep.prepare import prepare
from data_prep.vocabularies import train_bpe

BYTES, SMALL_BYTES = 3_000_000, 300_000
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="dataset folder to make; nothing is done if it is there")
    parser.add_argument("--small", action="store_true", help="a tenth of the text, for a rehearsal")
    args = parser.parse_args()
    if args.output.exists():
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu-data-", dir=args.output.parent))
    try:
        corpus = build_demo_corpus(folder / "text", SMALL_BYTES if args.small else BYTES)
        train_bpe([corpus.train], VOCABULARY, folder / "tokenizer")
        options = PrepareOptions(
            inputs=[corpus.train], tokenizer=folder / "tokenizer", output=folder / "data", split="96,2,2", workers=1,
            encoder="tokenizers",
        )  # fmt: skip
        prepare(options)
        os.rename(folder / "data", args.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
