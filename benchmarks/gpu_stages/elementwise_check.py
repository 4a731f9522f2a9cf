"""The kernels of a layer's element-wise work: values and gradients against float32 torch, equal bits, and time over the bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from optimizer_step import bandwidths, time_once
from torch.nn import functional as F

from megatron_lion.model import elementwise_launch as launch

from .stage import Stage
from .stage_facts import REHEARSAL_NUMEL

REPEATS = 20
PASSES = 46  # over a bf16 tensor of the residual stream, as tests/model/test_layer_bytes.py counts them
Tensors = list[torch.Tensor]


def check_elementwise(stage: Stage) -> None:
    """Runs what a layer of GPT-2 Small runs at a micro-batch of 16 samples: two norms, two residual sums, GELU, and the split.

    On CUDA the calls are captured in a graph, whose replays are timed: without it the host would be measured.
    """
    sequence, heads, channels = (8, 2, 16) if stage.rehearse else (1024, 12, 64)
    batch, width = (2, 32) if stage.rehearse else (16, 768)
    generator = torch.Generator(stage.device).manual_seed(0)

    def draw(*shape: int, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=stage.device) + shift).bfloat16()

    x, residual, dy = (draw(sequence, batch, width) for _ in range(3))
    weight, bias = draw(width, shift=1.0), draw(width)
    wide, dwide, wide_bias = (draw(sequence, batch, 4 * width), draw(sequence, batch, 4 * width), draw(4 * width))
    qkv = tuple(draw(batch, heads, sequence, channels).permute(2, 0, 1, 3) for _ in range(3))
    qkv_bias = draw(3 * width)
    nothing = launch.Dropout(None, 0)

    def once() -> Tensors:
        y, means, inverses = launch.layer_norm(x, weight, bias, 1e-5)
        found = [y, *launch.layer_norm_backward(dy, residual, x, weight, bias, means, inverses)]
        found += [launch.bias_gelu(wide, wide_bias, erf=False)]
        found += launch.bias_gelu_backward(dwide, wide, wide_bias, erf=False)
        found += [launch.bias_dropout_add(x, bias, residual, nothing)]
        found += launch.bias_dropout_add_backward(dy, bias, nothing)[1:]
        return found + list(launch.join_qkv(qkv, qkv_bias))

    def plain() -> Tensors:
        leaves = [tensor.float().requires_grad_() for tensor in (x, weight, bias, wide, wide_bias)]
        normed = F.layer_norm(leaves[0], (width,), leaves[1], leaves[2], 1e-5)
        gelu = F.gelu(leaves[3] + leaves[4], approximate="tanh")
        torch.autograd.backward([normed, leaves[0] * 1, gelu], [dy.float(), residual.float(), dwide.float()])
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        joined = torch.cat(qkv, dim=-1)
        sums = [dy.float().sum(dim=(0, 1)), joined.float().sum(dim=(0, 1)).flatten()]
        return [
            normed,
            *grads[:3],
            gelu,
            *grads[3:],
            residual.float() + x.float() + bias.float(),
            sums[0],
            joined,
            sums[1],
        ]

    found = once()
    # bf16 rounds by 2^-9 of a value; a sum's float32 error grows with what it adds up.
    apart = max(
        float(((one.float() - other.float()).abs() / (other.float().abs() + scale)).max())
        for one, other, scale in zip(found, plain(), SCALES, strict=True)
    )
    same = all(torch.equal(one, other) for _ in range(3) for one, other in zip(once(), found, strict=True))
    both = twice(once)
    replay = captured(both) if stage.device == "cuda" else both
    seconds = statistics.median(time_once(replay, stage.device)[0] for _ in range(2 if stage.rehearse else REPEATS))
    copy = bandwidths(stage.device, REHEARSAL_NUMEL if stage.rehearse else None)["copy"]
    # GELU and the split are there once a layer, and twice here.
    moved = (PASSES + 20 + 6) * 2 * x.numel()
    stage.row(
        "element-wise kernels", passed=apart <= 2.0**-7 and same, largest_relative_difference=apart, same_bits=same,
        over_bound=seconds / (moved / copy), ms=seconds * 1e3, tokens=sequence * batch, width=width,
    )  # fmt: skip


SCALES = (0.1, 0.1, 10.0, 10.0, 0.1, 0.1, 10.0, 0.1, 10.0, 0.1, 10.0)
"""What is added to the denominators: outputs near 0 of terms near 1, and sums over all tokens."""


def twice(once: Callable[[], Tensors]) -> Callable[[], None]:
    """Returns a function that makes the calls of a layer, which has two norms and two residual sums."""

    def both() -> None:
        once()
        once()

    return both


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """Captures the launches in a CUDA graph and returns its replay."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
