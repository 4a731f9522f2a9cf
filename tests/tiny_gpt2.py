"""A small text corpus with its own byte-level BPE, and the config of a tiny GPT-2 for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny import tiny_config

from megatron_lion.config import RunConfig
from megatron_lion.prepare.options import PrepareOptions
from megatron_lion.prepare.pipeline import prepare
from megatron_lion.prepare.vocabularies import train_bpe

WORDS = "the a of on in optimizer sign gradient step batch weight moves falls rises slowly fast never again".split()  # noqa: SIM905
VOCAB = 300


def prose(count: int, seed: int = 0) -> list[str]:
    """Returns documents of 20-80 words of a small vocabulary."""
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(20, 80))) + "." for _ in range(count)]


def write_text_corpus(folder: Path, documents: int = 160) -> str:
    """Writes a dataset folder and its tokenizer; returns the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = prose(documents)
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    train_bpe([folder / "text.txt"], VOCAB, folder / "tokenizer")
    options = PrepareOptions(
        tokenizer=folder / "tokenizer", output=folder / "data", split="80,10,10", workers=1, encoder="tokenizers"
    )
    prepare(options, texts)
    return str(folder / "data")


def tiny_gpt2(run_dir: Path | str, corpus: str, **changes: Any) -> RunConfig:
    """Returns `tiny.tiny_config` with a vocabulary that needs padding."""
    return tiny_config(run_dir, corpus, **{"model__vocab_size": None, **changes})
