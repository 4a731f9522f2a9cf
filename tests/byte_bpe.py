"""A byte-level BPE of GPT-2's kind with few merges, as vocab.json and merges.txt."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_lion.data.tokenizer_files import byte_letters

END = "<|endoftext|>"


def write_byte_bpe(folder: Path, *merges: str) -> Path:
    """Writes a vocabulary of the 256 bytes, the result of each merge such as "w o", and the end marker; returns the folder.

    Args:
        folder: made if it does not exist.
        merges: pairs in order of rank, each divided by a blank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_letters(), *(merge.replace(" ", "") for merge in merges), END]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return folder
