"""Weight gradients added by the matrix product: their sums against float64, their bits, memory, and time of both ways."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from optimizer_step import time_once

from megatron_lion.device import select_device
from megatron_lion.model.weight_gradients import add_weight_gradient, weight_gradients

from .stage import Stage

# Outputs and inputs of a layer of GPT-2 Small: its attention's two matrices, and its MLP's.
SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
MICRO_BATCHES = 4
# A tensor core may cut its fp32 sum off after each of 1,024 additions: 2^-24 each, 6e-5 in all. A 16-bit copy costs 1e-3.
TOLERANCE = 1e-4
REPEATS = 20


def check_weight_gradients(stage: Stage) -> None:
    """Sums four micro-batches of 16 x 1,024 tokens in each 16-bit dtype, with and without a 16-bit gradient in between."""
    tokens = 64 if stage.rehearse else 16 * 1024
    shapes = [(24, 8), (8, 24)] if stage.rehearse else SHAPES
    apart, apart_separate, same, extra = 0.0, 0.0, True, 0
    for dtype in (torch.bfloat16, torch.float16):
        for outputs, inputs in shapes:
            pairs = [operands(stage, dtype, tokens, outputs, inputs, seed) for seed in range(MICRO_BATCHES)]
            exact = torch.stack([grad.double().t() @ values.double() for values, grad in pairs]).sum(dim=0)
            fused, peak = added(pairs, add_weight_gradient)
            again, _ = added(pairs, add_weight_gradient)
            separate, _ = added(pairs, add_separately)
            same = same and torch.equal(fused, again)
            apart = max(apart, distance(fused, exact))
            apart_separate = max(apart_separate, distance(separate, exact))
            extra = max(extra, peak)
    pair = operands(stage, torch.bfloat16, tokens, *shapes[0], seed=0)
    seconds = {}
    for name, add in (("fused", add_weight_gradient), ("separate", add_separately)):
        total = torch.zeros(shapes[0], device=stage.device)
        repeats = 2 if stage.rehearse else REPEATS
        seconds[name] = statistics.median(
            time_once(lambda a=add, t=total: a(*pair, t), stage.device)[0] for _ in range(repeats + 2)
        )
    stage.row(
        "weight gradients = float64", passed=apart < TOLERANCE and same and extra == 0, relative_difference=apart,
        separate_difference=apart_separate, same_bits=same, extra_bytes=extra, ms=seconds["fused"] * 1e3,
        separate_over_fused=seconds["separate"] / seconds["fused"], product=weight_gradients(select_device(stage.device)),
    )  # fmt: skip


def operands(
    stage: Stage, dtype: torch.dtype, tokens: int, outputs: int, inputs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input, and a gradient of its output, seeded."""
    generator = torch.Generator(stage.device).manual_seed(seed)
    values, grad = (torch.randn(tokens, size, generator=generator, device=stage.device) for size in (inputs, outputs))
    return values.to(dtype), (grad / 64).to(dtype)


def added(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> tuple[torch.Tensor, int]:
    """Returns the sum of the products, and the bytes that were allocated for a while during the last one (on CUDA)."""
    values, grad = pairs[0]
    total = torch.zeros(grad.shape[1], values.shape[1], device=values.device)
    before = 0
    for values, grad in pairs:
        if values.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        add(values, grad, total)
    return total, int(torch.cuda.max_memory_allocated()) - before if total.is_cuda else 0


def add_separately(values: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """What a run without the fusion does: a 16-bit gradient, then DDP's hook."""
    total.add_(grad.t() @ values)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
