"""Named gradient buffers without Megatron, for tests of the sketch, and populations of batch gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from megatron_lion.gradient import sketch as sketches
from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.noise import estimate_noise, make_rung, rungs_of
from megatron_lion.gradient.norms import GradientNorms


class Buffers(torch.nn.Module):
    """Parameters with a `main_grad`, as megatron-core's DDP gives them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(sequence_parallel=False)
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.zeros(shape))
            parameter.main_grad = torch.zeros(shape)
            self.register_parameter(name, parameter)

    def fill(self, flat: torch.Tensor) -> None:
        """Writes a gradient [d], in the order of the parameters' names."""
        place = 0
        for _, parameter in sorted(self.named_parameters()):
            part = flat[place : place + parameter.numel()]
            parameter.main_grad.copy_(part.view(parameter.shape))
            place += parameter.numel()


def one_process(monkeypatch) -> None:
    """Tensor-parallel size 1 without process groups."""
    monkeypatch.setattr(sketches.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(sketches.parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)


class Whole:
    """A sketch that keeps every coordinate: its vectors are [2 d], once for the squares and once for ‖·‖₁."""

    relative_error = 0.0

    def __init__(self, d: int) -> None:
        self.d = d
        self.weights_C = torch.ones(d)
        self.names, self.sampled_counts = ("all",), (d,)

    def squares(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.double().square().sum()

    def l1(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.abs().sum(dtype=torch.float64)

    def sampled(self, vector: torch.Tensor) -> torch.Tensor:
        return vector


def measured(
    batches: torch.Tensor, counts: list[int] | None = None, *, population: float | None = None, samples: int = 8
):
    """Noise estimate and ladder of batch gradients [n, d] (means over their counts)."""
    n, d = batches.shape
    counts = counts or [1] * n
    grouped = GroupedBatches(Whole(d), n)
    for batch, count in zip(batches, counts, strict=True):
        grouped.add((batch * count).clone(), count)
    weights = torch.tensor(counts, dtype=torch.float64)[:, None]
    rungs = rungs_of(n)
    groups = grouped.finish(rungs)
    norms = {k: norms_of((batches[:k] * weights[:k]).sum(0) / weights[:k].sum()) for k in rungs}
    ladder = [make_rung(k, norms[k], groups, population) for k in rungs]
    return estimate_noise(groups, norms[n], batch_samples=samples, population=population), ladder


def norms_of(mean: torch.Tensor) -> GradientNorms:
    mean = mean.double()
    return GradientNorms(
        float(mean.abs().sum()), float(mean.norm()), float(mean.abs().max()), 0.0, None, 0.0, None, mean.numel()
    )


def signal(shape: str, d: int, generator: torch.Generator) -> torch.Tensor:
    """A gradient [d] of ‖·‖₂ = 1: dense, with 2 % of its coordinates, or heavy-tailed."""
    normal = torch.randn(d, generator=generator, dtype=torch.float64)
    if shape == "sparse":
        normal *= torch.rand(d, generator=generator) < 0.02
    if shape == "heavy":
        normal = torch.exp(2 * normal) * torch.sign(torch.randn(d, generator=generator, dtype=torch.float64))
    return normal / normal.norm()


def noise_sd(share: float, n: int, d: int) -> float:
    """Standard deviation of a coordinate of one batch at which noise is this share of ‖ḡ‖² over n batches."""
    return math.sqrt(share / (1 - share) * n / d)
