"""Samples text from a next-token model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lion.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Rules for choosing the next token.

    Attributes:
        max_new_tokens: largest number of added tokens.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw from; 0 draws from all.
        top_p: probability of the smallest set of likeliest tokens to draw from; 1 draws from all.
        seed: seed of the draws.
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
    allowed: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    on_token: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:
    """Continues a prompt `count` times.

    There is no cache of keys and values: each token costs a forward pass over the whole text, so this suits a few lines.

    Args:
        logits: called with token ids [B, S] (int64, on `device`) and 1; returns logits [B, 1, V] after the last token.
        prompt: token ids, at least one.
        count: number of continuations, B.
        settings: rules for choosing a token.
        seq_length: the model's context length; it sees at most this many of the last tokens.
        end_id: token at which a continuation ends, not included; None means that none ends early.
        allowed: ids to draw from, see `token_ids`. None allows every row of the output layer, including rows that
            belong to no token.
        device: the device of the model.
        on_token: called before each forward pass with the number of tokens that every continuation has by then.

    Returns:
        The new tokens of each continuation.
    """
    # A CPU generator and float64 logits on the CPU: a seed then draws by the same random numbers on every device.
    generator = torch.Generator().manual_seed(settings.seed)
    tokens_BS = torch.tensor([prompt] * count, dtype=torch.int64)
    running_B = torch.ones(count, dtype=torch.bool)
    added: list[list[int]] = [[] for _ in range(count)]
    allowed_V = None if allowed is None else torch.tensor(list(allowed))
    for number in range(settings.max_new_tokens):
        on_token(number)
        logits_BV = logits(tokens_BS[:, -seq_length:].to(device), 1)[:, -1].double().cpu()
        if allowed_V is not None:
            logits_BV = torch.full_like(logits_BV, float("-inf")).index_copy_(1, allowed_V, logits_BV[:, allowed_V])
        next_B = _choose(logits_BV, settings, generator)
        if end_id is not None:
            running_B &= next_B != end_id
        if not running_B.any():
            break
        # Ended continuations stay in the batch, so its shape is constant; their further tokens are dropped.
        for row in running_B.nonzero().flatten().tolist():
            added[row].append(int(next_B[row]))
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], dim=1)
    return added


def token_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that belong to a token, ascending.

    A vocabulary may have holes: ids below its size that belong to no token.
    """
    return sorted(set(tokenizer.backend.get_vocab(with_added_tokens=True).values()))


def _choose(logits_BV: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """Returns one token for each row, int64 [B]."""
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
