r"""Perplexity of one token stream by overlapping windows; each target is scored exactly once.

The stream $x_0 \dots x_{n-1}$ is scored without a start token: $x_0$ is only context, so there are $n-1$
targets. Windows have the model's length $S$ and start every $o$ tokens (the stride). The first window scores
all of its $S$ targets. Each later window scores only its last $o$, which have more than $S-o$ tokens of context:

$$\mathrm{loss} = \frac{1}{n-1} \sum_{t=1}^{n-1} -\ln p(x_t \mid x_{s(t)} \dots x_{t-1}).$$

Source: the convention of Megatron-LM's zero-shot evaluation; reading a stream with a stride shorter than the
window is also the Hugging Face documentation's `stride`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_lion.errors import ConfigError, DataError
from megatron_lion.evaluate.token_scores import (
    Segment,
)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One window: `tokens[start : stop + 1]` go through the model; `first_target` to `stop` (inclusive) are scored."""

    start: int
    stop: int
    first_target: int

    @property
    def num_scored(self) -> int:
        """Number of targets that this window scores."""
        return self.stop - self.first_target + 1


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The windows of a stream; build it with `plan_windows`.

    Attributes:
        n_tok: tokens in the stream.
        seq_length: largest number of predictions in a window, S.
        stride: tokens from the start of one window to the start of the next, o.
    """

    n_tok: int
    seq_length: int
    stride: int

    @property
    def num_windows(self) -> int:
        """Number of windows that score at least one target."""
        return 1 + max(0, math.ceil((self.n_tok - 1 - self.seq_length) / self.stride))

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through the model, if every window has the full length."""
        return self.num_windows * self.seq_length

    def window(self, index: int) -> Window:
        """Returns the window of an index; 0 is the first."""
        start = index * self.stride
        first = 1 if index == 0 else start + self.seq_length - self.stride + 1
        return Window(start=start, stop=min(start + self.seq_length, self.n_tok - 1), first_target=first)


def plan_windows(n_tok: int, seq_length: int, stride: int) -> WindowPlan:
    """Plans the windows over a stream of `n_tok` tokens.

    Args:
        n_tok: tokens in the stream, at least 2.
        seq_length: the model's context length in tokens.
        stride: targets that each window after the first scores; `seq_length` gives windows that do not overlap.

    Raises:
        ConfigError: the stride is outside 1..seq_length.
        DataError: the stream has fewer than two tokens.

    >>> plan = plan_windows(n_tok=11, seq_length=4, stride=3)
    >>> [(w.start, w.stop, w.first_target) for w in map(plan.window, range(plan.num_windows))]
    [(0, 4, 1), (3, 7, 5), (6, 10, 8)]
    """
    if not 1 <= stride <= seq_length:
        raise ConfigError(f"--stride {stride}: must be from 1 to the model's sequence length {seq_length}")
    if n_tok < 2:
        raise DataError(f"the text encodes to {n_tok} token(s); perplexity needs at least 2")
    return WindowPlan(n_tok=n_tok, seq_length=seq_length, stride=stride)


def perplexity(loss: float) -> float:
    """Returns exp(loss), or infinity if float64 overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def stream_segments(tokens: Tensor, plan: WindowPlan) -> list[Segment]:
    """Returns the windows of a plan as segments to score.

    Args:
        tokens: the token ids, int64 [plan.n_tok].
        plan: from `plan_windows`.
    """
    assert tokens.numel() == plan.n_tok, "the plan is for another stream"
    windows = map(plan.window, range(plan.num_windows))
    return [Segment(ids=tokens[w.start : w.stop + 1], num_scored=w.num_scored) for w in windows]
