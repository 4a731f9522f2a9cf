"""What the sign of LION's update direction c has to do with the full gradient: the term that the convergence proof bounds.

To first order, a step lowers f by η (⟨∇f, sign(c)⟩ + λ⟨∇f, θ⟩). The proof splits ⟨∇f, sign(c)⟩ = ‖∇f‖₁ − loss with

    loss = Σ_i |∇f_i| |sign(c_i) − sign(∇f_i)| ≤ 2 ‖c − ∇f‖₁ ≤ 2√d ‖c − ∇f‖₂

and bounds the last expression (Lemma 6). A probe measures the loss itself: with the momentum m of the run and the gradient
g of the probe's first batch, c = β₁m + (1−β₁)g is the direction that a training step with this batch would take. The
other batches are independent of c, so the mean of ⟨sign(c), g_j⟩ over them has no bias.

Source: Dong, Li, Lin, "Convergence Rate Analysis of LION" (arXiv 2411.07724), the proof of Theorem 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.gradient.blocks import blocks_of, error_of
from megatron_lion.gradient.noise import unseen
from megatron_lion.gradient.parameter_kinds import in_group, kind_of, layer_of
from megatron_lion.optim.key_bias import is_qkv_bias, key_part
from megatron_lion.optim.parameter_shards import Shard

KEY_BIAS = "#key bias"
"""Suffix of the additional row for the key's part of an attention's bias, whose true gradient is 0 (optim/key_bias.py)."""
_SUMS = ("count", "zeros", "flips", "agrees", "l1", "error_l1", "theta_l1")


class SignStatistics:
    """Follows the reads of an accumulation; every method is a collective call.

    Between the first and the last read it keeps c in the host's memory, 4 bytes for each parameter of the process's shard,
    and the first gradient until the second read.

    Args:
        names: names of the parameters, equal on every rank.
        betas: (β₁, β₂).
        clip_grad: largest norm of a training gradient; 0 if it is not clipped.
        settings: megatron-core's settings of the model.
        device: device of the gradient buffers.
        freeze_key_bias: whether training sets the gradients of the key biases to 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        betas: tuple[float, float],
        clip_grad: float,
        settings: Any,
        device: torch.device,
        *,
        freeze_key_bias: bool = False,
    ) -> None:
        self._freeze_key_bias = freeze_key_bias
        self.betas, self.clip_grad, self.device = betas, clip_grad, device
        self.rows = tuple(row for name in names for row in ((name, name + KEY_BIAS) if is_qkv_bias(name) else (name,)))
        self._place = {row: place for place, row in enumerate(self.rows)}
        self._settings = settings
        self._sums = torch.zeros(len(self.rows), len(_SUMS), dtype=torch.float64)
        self._directions: list[torch.Tensor] = []
        self._first: list[torch.Tensor] = []
        self._reads: list[tuple[int, int, torch.Tensor]] = []
        self.clip_factor = 1.0

    @torch.no_grad()
    def read(self, shards: Iterable[Shard], *, batches: int, count: int, scale: float, grad_l2: float) -> None:
        """Uses the sum of the gradients so far; call it after every reduction, the first time after one batch.

        Args:
            shards: slices whose `grad` is the sum over all samples so far, in the same order at every call.
            batches: number of batches so far.
            count: what the loss counted over them.
            scale: factor from the sum to the mean gradient.
            grad_l2: ‖·‖₂ of the mean gradient so far.
        """
        if not self._reads and self.clip_grad > 0:
            self.clip_factor = min(1.0, self.clip_grad / (grad_l2 + 1e-6))
        aligned_P = torch.zeros(len(self.rows), dtype=torch.float64)
        for number, (shard, grad_N) in enumerate(_with_gradients(shards)):
            mean_N = grad_N.float().cpu() * scale
            if not self._reads:
                self._start(shard, mean_N)
            elif self._first:
                self._count_flips(number, shard, mean_N, count)
            sign_N = self._directions[number].sign()
            for place, chosen in self._parts(shard):
                aligned_P[place] += (sign_N * mean_N)[chosen].sum(dtype=torch.float64)
        if self._reads:
            self._first = []
        self._reads.append((batches, count, self._reduced(aligned_P)))

    @torch.no_grad()
    def finish(self, shards: Iterable[Shard], scale: float) -> SignTable:
        """Computes the sums that need the mean over all batches.

        Args:
            shards, scale: as for the last `read`.
        """
        for number, (shard, grad_N) in enumerate(_with_gradients(shards)):
            mean_N, c_N = grad_N.float().cpu() * scale, self._directions[number]
            theta_N = shard.main.detach().float().cpu()
            values = {
                "count": torch.ones_like(c_N), "zeros": c_N == 0, "agrees": c_N * mean_N > 0, "l1": mean_N.abs(),
                "error_l1": (c_N - mean_N).abs(), "theta_l1": theta_N.abs(),
            }  # fmt: skip
            for place, chosen in self._parts(shard):
                for name, value_N in values.items():
                    self._sums[place, _SUMS.index(name)] += value_N[chosen].sum(dtype=torch.float64)
        return SignTable(self.rows, self._reduced(self._sums), tuple(self._reads), self.clip_factor)

    def _start(self, shard: Shard, grad_N: torch.Tensor) -> None:
        grad_N = self._trained(shard, grad_N * self.clip_factor)
        self._directions.append(torch.lerp(grad_N, _momentum(shard, grad_N), self.betas[0]))
        self._first.append(grad_N)

    def _trained(self, shard: Shard, grad_N: torch.Tensor) -> torch.Tensor:
        """The gradient as a training step uses it."""
        if self._freeze_key_bias and is_qkv_bias(shard.name):
            return grad_N.masked_fill(key_part(shard.start, grad_N.numel(), self._settings), 0.0)
        return grad_N

    def _count_flips(self, number: int, shard: Shard, mean_N: torch.Tensor, count: int) -> None:
        """Counts the signs that change from this step to one with the second batch, at the same parameters."""
        (beta1, beta2), first_N, c_N = self.betas, self._first[number], self._directions[number]
        _, first_count, _ = self._reads[0]
        second_N = (mean_N * count - first_N / self.clip_factor * first_count) / max(1, count - first_count)
        exp_avg_N = _momentum(shard, first_N)
        next_N = beta1 * (beta2 * exp_avg_N + (1 - beta2) * first_N) + (1 - beta1) * self.clip_factor * second_N
        flips_N = next_N * c_N < 0
        for place, chosen in self._parts(shard):
            self._sums[place, _SUMS.index("flips")] += flips_N[chosen].sum()

    def _parts(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        """Yields (row, which elements of the shard belong to it)."""
        yield self._place[shard.name], slice(None)
        if is_qkv_bias(shard.name):
            yield self._place[shard.name + KEY_BIAS], key_part(shard.start, shard.main.numel(), self._settings)

    def _reduced(self, sums: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1:
            on_device = sums.to(self.device)
            dist.all_reduce(on_device)
            return on_device.cpu()
        return sums.clone()


@dataclass(frozen=True)
class SignTable:
    """Sums of each parameter over all ranks.

    Attributes:
        rows: names of the parameters, and rows for the key biases, which are also in their parameter's row.
        sums: float64 [P, 7], of the columns in `_SUMS`.
        reads: (batches, count, ⟨sign(c), ḡ⟩ of each row, float64 [P]) at each read.
        clip_factor: factor by which clipping shortens the first batch's gradient.
    """

    rows: tuple[str, ...]
    sums: torch.Tensor
    reads: tuple[tuple[int, int, torch.Tensor], ...]
    clip_factor: float

    def of(
        self, keep: Callable[[str], bool], bounds: Mapping[str, Any] | None, grad_l2: float, population: float | None
    ) -> dict[str, Any] | None:
        """Returns the statistics of the rows whose name `keep` accepts, ready for JSON; None if there is none.

        Args:
            keep: accepts names of rows.
            bounds: `norm_ratio_low`, `norm_ratio_high` and `noise_share` of these parameters, if they are known.
            grad_l2: ‖ḡ‖₂ of these parameters.
            population: number of batches in the data set; None for an unlimited one.
        """
        places = [place for place, row in enumerate(self.rows) if keep(row)]
        count, zeros, flips, agrees, l1, error_l1, theta_l1 = self.sums[places].sum(0).tolist()
        if not count:
            return None
        descent, error = self._descent(places, population)
        low, high = None, None
        if bounds and bounds.get("norm_ratio_low") is not None and bounds.get("norm_ratio_high") is not None:
            clean = grad_l2 * math.sqrt(max(0.0, 1 - bounds["noise_share"]))
            low, high = (clean * bounds[f"norm_ratio_{end}"] for end in ("low", "high"))
        # |⟨∇f, sign(c)⟩| ≤ ‖∇f‖₁; an estimate below the descent would give a share beyond 1.
        ends = sorted(max(-1.0, min(descent / end, 1.0)) for end in (low, high) if end)
        shares = (ends[0], ends[1]) if len(ends) == 2 else (None, None)
        return {
            "num_parameters": int(count),
            "descent": descent,
            "descent_standard_error": error,
            "descent_share_low": shares[0],
            "descent_share_high": shares[1],
            "sign_loss_low": None if low is None else max(0.0, low - descent),
            "sign_loss_high": None if high is None else max(0.0, high - descent),
            "direction_error_l1": error_l1,
            "grad_l1": l1,
            "agreement_share": agrees / count,
            "zero_share": zeros / count,
            "flip_share": flips / count,
            "mean_abs_theta": theta_l1 / count,
        }

    def _descent(self, places: list[int], population: float | None) -> tuple[float, float | None]:
        """⟨∇f, sign(c)⟩ and its standard error, from the blocks of batches between two reads."""
        reads = [(batches, count, float(means[places].sum())) for batches, count, means in self.reads]
        first, last = reads[0], reads[-1]
        rest = (last[1] * last[2] - first[1] * first[2]) / max(1, last[1] - first[1])
        own = first[2]
        known = 0.0 if population is None else 1 / population  # the first batch is one of the N of the data set
        descent = (1 - known) * rest + known * own
        error = error_of(blocks_of(reads), rest)
        return descent, None if error is None else error * math.sqrt(unseen(last[0], population))


def sign_statistics(
    table: SignTable,
    norms_of: Callable[[Callable[[str], bool]], Any],
    noise: Mapping[str, Any] | None,
    by_part: Mapping[str, Any] | None,
    population: float | None,
) -> dict[str, Any]:
    """Returns the sign statistics of the model and its parts, ready for JSON.

    Args:
        table: from `SignStatistics.finish`.
        norms_of: returns the `GradientNorms` of the parameters whose name a function accepts.
        noise, by_part: noise and bounds of the model and of its parts.
        population: number of batches in the data set; None for an unlimited one.
    """

    def of(keep: Callable[[str], bool], bounds: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return table.of(
            lambda row: not row.endswith(KEY_BIAS) and keep(row), bounds, norms_of(keep).grad_l2, population
        )

    names = [row for row in table.rows if not row.endswith(KEY_BIAS)]
    parts = by_part or {}
    found: dict[str, Any] = {
        "clip_factor": table.clip_factor,
        "batches": table.reads[-1][0],
        "blocks": len(table.reads) - 1,
        "all": of(lambda name: True, noise),
        "without_embeddings": of(lambda name: kind_of(name) != "embedding", parts.get("without_embeddings")),
        "key_biases": table.of(lambda row: row.endswith(KEY_BIAS), None, 0.0, population),
    }
    for block, group_of in (("layers", layer_of), ("kinds", kind_of)):
        found[block] = {
            group: of(in_group(group_of, group), parts.get(block, {}).get(group))
            for group in dict.fromkeys(map(group_of, names))
        }  # fmt: skip
    return found


def _with_gradients(shards: Iterable[Shard]) -> Iterator[tuple[Shard, torch.Tensor]]:
    """Yields the slices that have a gradient, with it."""
    for shard in shards:
        if shard.grad is not None:
            yield shard, shard.grad


def _momentum(shard: Shard, grad_N: torch.Tensor) -> torch.Tensor:
    """The momentum before a step with this gradient, which replaces NaN: m⁰ = g¹ before the first step."""
    exp_avg_N = shard.state["exp_avg"].detach().float().cpu()
    return torch.where(exp_avg_N.isnan(), grad_N, exp_avg_N)
