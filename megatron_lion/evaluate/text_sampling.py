"""Text from a next-token model, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many are added.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among so many likeliest; 0 among all.
        top_p: draw among the fewest likeliest tokens that together have this probability; 1 among all.
        seed: of the draws.
    """

    max_new_tokens: int = 40
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def sample(
    logits: Callable[[Tensor, int], Tensor],
    prompt: list[int],
    count: int,
    settings: SamplingSettings,
    *,
    seq_length: int,
    end_id: int | None,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Continues a prompt `count` times; without a cache of keys and values, so meant for a few lines.

    Args:
        logits: called with ids [B, S] and 1; returns logits [B, 1, V] after the last one.
        prompt: token ids, at least one.
        count: continuations, B.
        settings: how to choose.
        seq_length: the model sees at most so many of the last tokens.
        end_id: a continuation ends before this token; None: never.
        device: of the model.

    Returns:
        The new tokens of each continuation.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    tokens_BS = torch.tensor([prompt] * count, dtype=torch.int64)
    running_B = torch.ones(count, dtype=torch.bool)
    added: list[list[int]] = [[] for _ in range(count)]
    for _ in range(settings.max_new_tokens):
        logits_BV = logits(tokens_BS[:, -seq_length:].to(device), 1)[:, -1].double().cpu()
        next_B = _choose(logits_BV, settings, generator)
        if end_id is not None:
            running_B &= next_B != end_id
        if not running_B.any():
            break
        for row in running_B.nonzero().flatten().tolist():
            added[row].append(int(next_B[row]))
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], dim=1)
    return added


def _choose(logits_BV: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """One token a row."""
    if settings.temperature == 0.0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / settings.temperature
    if 0 < settings.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    if settings.top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)  # probability of all likelier tokens
        drop_BV = (before_BV >= settings.top_p).scatter(-1, order_BV, before_BV >= settings.top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)
