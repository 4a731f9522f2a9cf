"""A tiny BERT corpus, made by `prepare`, and the config of a tiny BERT."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from tiny import tiny_config

from megatron_lion.config import RunConfig
from megatron_lion.prepare.options import PrepareOptions
from megatron_lion.prepare.pipeline import prepare

LETTERS = "abcdefghij"
WORDS = ["".join(pair) for pair in itertools.product("bdfg", "aeio", "cdhj")]
VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ".",
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    "o",
    *WORDS,
]
SEQ_LENGTH = 32


def write_vocab(folder: Path, tokens: list[str] = VOCAB) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def documents(count: int, sentences: int, seed: int = 0) -> list[str]:
    """Returns random documents with words of one and of several pieces, and sentences of 3-9 words."""
    dice = random.Random(seed)

    def word() -> str:
        return dice.choice(WORDS) if dice.random() < 0.7 else "".join(dice.choices(LETTERS, k=3))

    def sentence() -> str:
        return " ".join(word() for _ in range(dice.randint(3, 9))).capitalize() + "."

    return [" ".join(sentence() for _ in range(dice.randint(2, sentences))) for _ in range(count)]


def write_bert_corpus(folder: Path, texts: list[str] | None = None) -> str:
    """Writes a dataset folder for BERT and returns its path."""
    options = PrepareOptions(
        tokenizer=write_vocab(folder), output=folder / "data", split="80,10,10", task="bert", workers=1, encoder="tokenizers"
    )  # fmt: skip
    prepare(options, texts or documents(160, 12))
    return str(folder / "data")


def tiny_bert(run_dir: Path | str, corpus: str, **changes: Any) -> RunConfig:
    """Returns `tiny.tiny_config` for a BERT of two layers."""
    settings = {"model__kind": "bert", "model__seq_length": SEQ_LENGTH, "model__vocab_size": None, **changes}
    return tiny_config(run_dir, corpus, **settings)
