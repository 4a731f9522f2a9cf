"""Spot checks of a BERT: the likeliest tokens for each [MASK], and the probability of a sentence order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_lion.errors import ConfigError
from megatron_lion.evaluate.text_sampling import token_ids

if TYPE_CHECKING:
    from megatron_lion.evaluate.open_run import RestoredRun

MASK = "[MASK]"


@dataclass(frozen=True)
class Guess:
    """A predicted token for one [MASK], and its probability in [0, 1]."""

    token: str
    probability: float


def fill_mask(run: RestoredRun, text: str, top: int = 5) -> list[list[Guess]]:
    """Returns the likeliest tokens for every [MASK] of a text.

    Args:
        run: a BERT run with a step loaded.
        text: a text with one or more [MASK]; all of them are masked in one forward pass.
        top: number of guesses for each [MASK].

    Returns:
        One list of guesses for each [MASK] in order, likeliest first.

    Raises:
        ConfigError: the text has no [MASK], or more tokens than the model's sequence length.
    """
    special = run.tokenizer.bert_special_ids()
    parts = [run.tokenizer.encode(part) for part in text.split(MASK)]
    if len(parts) < 2:
        raise ConfigError(
            f"--fill-mask {text!r}: the text has no {MASK}; put {MASK} in the place of each word to predict"
        )
    ids = [special["[CLS]"], *parts[0]]
    places = []
    for part in parts[1:]:
        places.append(len(ids))
        ids += [special[MASK], *part]
    ids.append(special["[SEP]"])
    _check_length("--fill-mask", text, ids, run.seq_length)
    logits_MV, _ = run.bert_logits(torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long), places)
    # Some rows of the output layer may belong to no token: beyond the tokenizer's ids, or in a hole of its vocabulary.
    ids = token_ids(run.tokenizer)
    probabilities = logits_MV.double().softmax(dim=-1)[:, ids]
    best = probabilities.topk(min(top, len(ids)), dim=-1)
    backend = run.tokenizer.backend
    return [
        [Guess(backend.id_to_token(ids[index]) or "", probability) for probability, index in zip(*place, strict=True)]
        for place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def order_probability(run: RestoredRun, first: str, second: str) -> float:
    """Returns the probability, by the sentence-order head, that `first` comes before `second` in their document.

    Args:
        run: a BERT run with a step loaded.
        first, second: consecutive passages of one text, encoded as [CLS] first [SEP] second [SEP].

    Raises:
        ConfigError: a passage has no token, or both together have more tokens than the model's sequence length.
    """
    special = run.tokenizer.bert_special_ids()
    segments = [run.tokenizer.encode(passage) for passage in (first, second)]
    for passage, segment in zip((first, second), segments, strict=True):
        if not segment:
            raise ConfigError(f"--sentence-order: {passage!r} has no token; give two passages of text")
    one = [special["[CLS]"], *segments[0], special["[SEP]"]]
    ids = [*one, *segments[1], special["[SEP]"]]
    _check_length("--sentence-order", f"{first} {second}", ids, run.seq_length)
    types = torch.tensor([[0] * len(one) + [1] * (len(ids) - len(one))])
    _, order_logits_2 = run.bert_logits(torch.tensor([ids]), types, [0])
    return float(order_logits_2.double().softmax(dim=-1)[0])  # class 0: in order; class 1: swapped


def _check_length(flag: str, text: str, ids: list[int], seq_length: int) -> None:
    if len(ids) > seq_length:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise ConfigError(
            f"{flag} {shown!r}: {len(ids)} tokens, but the model reads at most {seq_length}; give a shorter text"
        )
