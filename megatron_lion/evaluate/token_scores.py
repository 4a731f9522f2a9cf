"""Scores token segments with a model: the negative log likelihood of next tokens, in batches over the ranks.

Shape suffixes: B batch, T tokens (one more than predictions), S predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_lion.errors import NumericsError

OnWindows = Callable[[int, int], None]
"""Called with (segments that this rank has scored, segments that this rank scores in all)."""

PAD_TO = 64
"""Batches are padded to a multiple of this length: few shapes occur, and sequence-parallel ranks can divide them."""


ROWS = {"cpu": 256, "cuda": 1024}
"""Positions whose logits exist at a time, by device: 51 and 206 MB in float32 at a vocabulary of 50,304."""


class Scorer(Protocol):
    """A function that returns the negative log likelihood of each token after the first.

    It is called with token ids [B, T] (int64, on the CPU) and returns [B, T-1] in nats, fp32 or fp64, on any
    device: element i is -ln p(token i+1 | tokens 0..i). The model is causal, so padding on the right changes
    nothing.
    """

    def __call__(self, tokens_BT: Tensor, /) -> Tensor: ...


@runtime_checkable
class DetailedScorer(Protocol):
    """A scorer of the last positions alone that also reports whether each token was the likeliest.

    `score(tokens_BT, last)` returns (nll, is_greedy), both [B, last], for the last `last` predictions. An
    implementation runs the output layer for those alone.
    """

    def score(self, tokens_BT: Tensor, last: int, /) -> tuple[Tensor, Tensor]: ...


class LogitsScorer:
    """Both scorer interfaces over a network and its output layer.

    The logits never exist whole: the output layer runs on a few positions at a time (`ROWS`), and each part is reduced to three
    numbers a position before the next one. At a vocabulary of 50,304 and 16 windows of 1,024 tokens they would be 3.3 GB
    in float32, and as much again for their exponentials.

    Args:
        hidden: called with token ids [B, S] on `device` and `last`; returns the hidden states [B, last, H], or the logits
            themselves [B, last, V], of any float dtype.
        device: device to which the token ids are copied.
        project: the output layer: called with hidden states [N, H]; returns logits [N, V]. By default they are the logits.
    """

    def __init__(
        self,
        hidden: Callable[[Tensor, int], Tensor],
        device: torch.device | str = "cpu",
        project: Callable[[Tensor], Tensor] = lambda hidden_NH: hidden_NH,
    ) -> None:
        self.hidden, self.project = hidden, project
        self.device = torch.device(device)

    def __call__(self, tokens_BT: Tensor, /) -> Tensor:
        """Returns the negative log likelihood of every token after the first, [B, T-1], fp32."""
        return self.score(tokens_BT, tokens_BT.shape[1] - 1)[0]

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, last: int, /) -> tuple[Tensor, Tensor]:
        """Returns the negative log likelihood (fp32) of the last `last` tokens and whether each was the likeliest, [B, last]."""
        tokens_BT = tokens_BT.to(self.device)
        targets_BS = tokens_BT[:, -last:]
        hidden_BSH = self.hidden(tokens_BT[:, :-1], last)
        rows = ROWS[self.device.type]
        score_rows = _RowScores()
        parts = [
            score_rows(self.project(hidden_NH), targets_N)
            for hidden_NH, targets_N in zip(
                hidden_BSH.reshape(-1, hidden_BSH.shape[-1]).split(rows),
                targets_BS.reshape(-1).split(rows),
                strict=True,
            )
        ]
        nll_BS, greedy_BS = (torch.cat(values).view(targets_BS.shape) for values in zip(*parts, strict=True))
        return nll_BS, greedy_BS


class _RowScores:
    """The scores of rows of logits. All parts of a batch write their log probabilities to the same memory.

    On a CPU a block of this size is returned to the system at each free, and the page faults of the next one take longer than
    log_softmax itself.
    """

    def __init__(self) -> None:
        self._log_p_NV: Tensor | None = None

    def __call__(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the negative log likelihood (fp32) of each target and whether it is the likeliest, [N].

        No call may have more rows than the first one.
        """
        logits_NV = logits_NV.float()  # the sum over V would otherwise be rounded to bf16's 8 bits
        if self._log_p_NV is None:
            self._log_p_NV = torch.empty_like(logits_NV)
        log_p_NV = self._log_p_NV[: len(logits_NV)]
        # On a CPU log_softmax takes half the time of a logsumexp, which passes over the logits six times.
        torch.log_softmax(logits_NV, -1, out=log_p_NV)
        nll_N = -log_p_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
        return nll_N, _are_likeliest(logits_NV, targets_N)


def _are_likeliest(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Returns whether each target is the argmax of its row, [N]."""
    if logits_NV.is_cuda:  # nonzero would wait for the device
        return logits_NV.argmax(-1) == targets_N
    # On a CPU the largest value takes a sixth of its index's time. The index decides among equal values.
    likeliest_N = logits_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1) == logits_NV.amax(-1)
    rows = likeliest_N.nonzero().squeeze(-1)
    likeliest_N[rows] = logits_NV[rows].argmax(-1) == targets_N[rows]
    return likeliest_N


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that go through the model together, and the number of last ones that are scored.

    Attributes:
        ids: token ids, int64 [T], at least two.
        num_scored: number of scored tokens at the end, 1 to T-1; those before are context.
    """

    ids: Tensor
    num_scored: int

    @property
    def num_context(self) -> int:
        """Tokens that are context only."""
        return len(self.ids) - self.num_scored


@dataclass(frozen=True, kw_only=True)
class SegmentScores:
    """Sums over segments on all ranks.

    Attributes:
        loss_sum: negative log likelihood in nats.
        num_targets: number of scored tokens.
        num_greedy: number of segments in which every scored token was the likeliest; 0 if the scorer has no `score`.
        last_loss_sum: negative log likelihood of the last token of each segment, in nats.
        num_last_greedy: number of segments whose last token was the likeliest; 0 if the scorer has no `score`.
    """

    loss_sum: float
    num_targets: int
    num_greedy: int
    last_loss_sum: float
    num_last_greedy: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.num_targets


def single_rank(tensor: Tensor) -> Tensor:
    """The all-reduce of a job with one rank: returns the tensor unchanged."""
    return tensor


def score_segments(
    segments: Sequence[Segment],
    scorer: Scorer | DetailedScorer,
    *,
    seq_length: int,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 8,
    all_reduce_sum: Callable[[Tensor], Tensor] = single_rank,
    progress: OnWindows | None = None,
) -> SegmentScores:
    """Scores segments in batches of similar length, each segment exactly once over all ranks.

    Rank r scores the segments k with k mod world_size = r. None is repeated to even out the ranks, so the sums are
    the same at any world size up to the order of additions in float64.

    Args:
        segments: the segments to score; the same on every rank.
        scorer: the model.
        seq_length: the model's context length; no segment has more than `seq_length + 1` tokens.
        rank: this data-parallel rank.
        world_size: number of data-parallel ranks.
        batch_size: segments in one call of the scorer.
        all_reduce_sum: returns the sum of a float64 CPU tensor over the ranks; called once, by every rank.
        progress: called after each batch.

    Returns:
        The sums over all ranks.

    Raises:
        NumericsError: on every rank, if any loss is NaN or infinite.
    """
    mine = segments[rank::world_size]
    # float64 holds the counts exactly (up to 2^53), so one tensor and one all-reduce serve all sums.
    sums, done = torch.zeros(5, dtype=torch.float64), 0
    for batch in _batches(mine, batch_size):
        sums += _score_batch(batch, scorer, seq_length)
        done += len(batch)
        if progress is not None:
            progress(done, len(mine))
    sums = all_reduce_sum(sums)
    # Checked after the reduction, which spreads a NaN to every rank: all raise, and none waits in a collective.
    if not bool(torch.isfinite(sums).all()):
        raise NumericsError(
            "the model's loss is NaN or infinite: its weights are damaged, or it overflows in this precision; "
            "try --precision fp32"
        )
    loss_sum, num_targets, num_greedy, last_loss_sum, num_last_greedy = sums.tolist()
    return SegmentScores(
        loss_sum=loss_sum, num_targets=round(num_targets), num_greedy=round(num_greedy), last_loss_sum=last_loss_sum,
        num_last_greedy=round(num_last_greedy),
    )  # fmt: skip


def _batches(segments: Sequence[Segment], batch_size: int) -> Iterator[list[Segment]]:
    """Yields batches, longest context first; in a batch, context lengths differ by at most PAD_TO tokens.

    A scorer runs the output layer from the shortest context of the batch on, so similar contexts save most of it.
    """
    ordered = sorted(segments, key=lambda s: (s.num_context, len(s.ids)), reverse=True)
    batch: list[Segment] = []
    for segment in ordered:
        if batch and (len(batch) == batch_size or batch[0].num_context - segment.num_context > PAD_TO):
            yield batch
            batch = []
        batch.append(segment)
    if batch:
        yield batch


def _score_batch(batch: list[Segment], scorer: Scorer | DetailedScorer, seq_length: int) -> Tensor:
    """Returns the five sums of SegmentScores, in its order (float64); pads the segments on the right to one length."""
    longest = max(len(s.ids) for s in batch) - 1
    # Position tables end at the model's length, which need not be a multiple of PAD_TO.
    length = min(-(-longest // PAD_TO) * PAD_TO, seq_length)
    last = length - min(s.num_context for s in batch) + 1
    tokens_BT = torch.zeros(len(batch), length + 1, dtype=torch.int64)
    scored_BS = torch.zeros(len(batch), last, dtype=torch.bool)
    ends_B = torch.zeros(len(batch), dtype=torch.int64)
    for row, segment in enumerate(batch):
        tokens_BT[row, : len(segment.ids)] = segment.ids
        begin = segment.num_context - (length + 1 - last)
        scored_BS[row, begin : begin + segment.num_scored] = True
        ends_B[row] = begin + segment.num_scored - 1
    if isinstance(scorer, DetailedScorer):
        nll_BS, greedy_BS = (t.cpu() for t in scorer.score(tokens_BT, last))
        # Context and padding count as greedy, so a row depends on its scored tokens alone.
        num_greedy = (greedy_BS | ~scored_BS).all(1).sum().double()
        num_last_greedy = greedy_BS.gather(1, ends_B[:, None]).sum().double()
    else:
        nll_BS = scorer(tokens_BT)[:, -last:].cpu()
        num_greedy = num_last_greedy = torch.zeros((), dtype=torch.float64)
    loss_sum = nll_BS.double()[scored_BS].sum()
    last_loss_sum = nll_BS.double().gather(1, ends_B[:, None]).sum()
    return torch.stack([loss_sum, scored_BS.sum().double(), num_greedy, last_loss_sum, num_last_greedy])
