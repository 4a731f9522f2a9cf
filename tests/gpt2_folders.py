"""Writes small GPT-2 folders with transformers, as others publish them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_gpt2(folder: Path, texts: Sequence[str], *, tokens: int, std: float | None = None, **sizes: Any) -> Path:
    """Writes a random GPT-2 and a byte-level tokenizer; the same arguments give the same files.

    Args:
        folder: an existing folder.
        texts: the texts from which the tokenizer is trained.
        tokens: the largest number of tokens; <|endoftext|> is one of them.
        std: standard deviation of all parameters; None keeps those of transformers, which are near zero.
        sizes: settings of GPT2Config; without vocab_size the model has a row for each token.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=tokens, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(folder))
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**{"vocab_size": bpe.get_vocab_size(), "n_embd": 16, "n_head": 2, **sizes}))
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder
