"""Makes the dataset of the GPU check's stage `run` from real text, this machine's Python documentation.

    python benchmarks/gpu_data.py wheels/gpu_data

The folder is created atomically, with about 2 M tokens, in ten seconds. The vocabulary is small, 1,024 ids, so that five
megabytes of text are enough for a probe of 1,600 samples of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from megatron_lion.prepare.demo_corpus import build_demo_corpus
from megatron_lion.prepare.options import PrepareOptions
from megatron_lion.prepare.pipeline import prepare
from megatron_lion.prepare.vocabularies import train_bpe

BYTES, SMALL_BYTES = 20_000_000, 300_000  # the first exceeds the size of the documentation, so all of it is used
VOCABULARY = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="dataset folder to create; an existing dataset is kept")
    parser.add_argument("--small", action="store_true", help="300 KB of the text, for a rehearsal")
    args = parser.parse_args()
    if (args.output / "manifest.json").is_file():
        return
    if args.output.exists():
        parser.error(f"{args.output}: exists and is not a dataset; choose another folder")
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
