"""The fused loss on one rank: its values and gradient against megatron-core's, and the time of both over the bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from optimizer_step import bandwidths, time_once

from megatron_lion.model.fused_loss import fused_cross_entropy

from .stage import Stage, release_memory
from .stage_facts import REHEARSAL_NUMEL

BYTES = 6  # a bf16 logit: two reads and a write
REPEATS = 20


def check_loss(stage: Stage) -> None:
    """Compares at a micro-batch of GPT-2 Small; the repeats overwrite the logits, which stay finite."""
    tokens, rows = (32, 500) if stage.rehearse else (16 * 1024, 50_304)
    generator = torch.Generator(stage.device).manual_seed(0)
    start = torch.randn(tokens, 1, rows, generator=generator, device=stage.device).mul_(3).bfloat16()
    labels = torch.randint(rows, (tokens, 1), generator=generator, device=stage.device)
    found = {}
    for name, loss in (("fused", fused_cross_entropy), ("megatron", vocab_parallel_cross_entropy)):
        logits = start.clone().requires_grad_()
        losses = loss(logits * 1, labels)
        losses.sum().backward()
        assert logits.grad is not None
        found[name] = losses.detach().double(), logits.grad
    (ours, our_grad), (theirs, their_grad) = found["fused"], found["megatron"]
    # Both round the gradient to bf16, of which one step is 2^-8 of a value; the largest is almost 1.
    apart = float((our_grad.float() - their_grad.float()).abs().max())
    relative = float((ours / theirs - 1).abs().max())
    passed = relative < 1e-5 and apart <= 2.0**-7
    del found, our_grad, their_grad
    release_memory()
    copy = bandwidths(stage.device, REHEARSAL_NUMEL if stage.rehearse else None)["copy"]
    bound = BYTES * start.numel() / copy
    seconds = {}
    for name, loss in (("fused", fused_cross_entropy), ("megatron", vocab_parallel_cross_entropy)):
        once = forward_and_backward(loss, start, labels)
        repeats = 2 if stage.rehearse else REPEATS
        seconds[name] = statistics.median(time_once(once, stage.device)[0] for _ in range(repeats + 2))
        release_memory()
    stage.row(
        "loss = megatron-core's", passed=passed, largest_relative_difference=relative, largest_gradient_difference=apart,
        over_bound=seconds["fused"] / bound, megatron_over_fused=seconds["megatron"] / seconds["fused"],
        ms=seconds["fused"] * 1e3, tokens=tokens, rows=rows,
    )  # fmt: skip


def forward_and_backward(
    loss: Callable[..., torch.Tensor], start: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """Returns a function that computes the loss of the logits and their gradient; the fused one overwrites its own logits."""
    logits = start.clone()

    def once() -> None:
        leaf = logits.detach().requires_grad_()
        loss(leaf, labels).sum().backward()

    return once
