"""Stage `correct`: compares the compiled kernel and the distributed optimizer with their references bit for bit."""

from __future__ import annotations

import os
import time

import torch

from megatron_lion.optim.lion import Lion
from megatron_lion.optim.precision import split_master

from .bitwise import FORMS, differences, same_bits
from .stage import Stage


def run(stage: Stage) -> None:
    if not stage.attempt("compiler", 1, lambda: compiler(stage)):
        return
    stage.attempt("kernel = reference", 20, lambda: every_form(stage))
    stage.attempt("CUDA graph", 2, lambda: graph(stage))
    stage.attempt("2^31 + 16 elements", 5, lambda: beyond_int32(stage))
    # megatron-core is imported only here: the parts above run without it.
    from .elementwise_check import check_elementwise
    from .gradient_check import check_weight_gradients
    from .loss_check import check_loss
    from .modes import check_section, compare_modes, on_one_rank
    from .norm_check import check_norms

    stage.attempt("norm kernels", 5, lambda: on_one_rank(stage, check_norms))
    stage.attempt("loss = megatron-core's", 8, lambda: on_one_rank(stage, check_loss))
    stage.attempt("element-wise kernels", 8, lambda: check_elementwise(stage))
    stage.attempt("optimizer's section in a CUDA graph", 8, lambda: check_section(stage))
    stage.attempt("weight gradients = float64", 4, lambda: check_weight_gradients(stage))
    stage.attempt("DistributedOptimizer on one rank", 20, lambda: compare_modes(stage))


def compiler(stage: Stage) -> None:
    """Compiles a kernel of one element; Triton builds its launcher with a C compiler, which a slim image may lack."""
    from megatron_lion.optim.triton_check import why_no_triton

    reason = why_no_triton()
    stage.row("compiler", passed=reason is None, reason=reason)
    if reason is not None:
        raise RuntimeError(f"no kernel can be compiled: {reason}")


def every_form(stage: Stage) -> None:
    began = time.monotonic()
    # Each process compiles its share of the forms. More than 8 CUDA contexts cost memory and save little time.
    processes = 1 if stage.rehearse else max(1, min(8, (os.cpu_count() or 2) // 2))
    forms = FORMS[::19] if stage.rehearse else FORMS
    wrong = differences(stage.device, forms, processes)
    stage.row(
        "kernel = reference", passed=not wrong, forms=len(forms), different=len(wrong), which=wrong[:20],
        seconds=time.monotonic() - began,
    )  # fmt: skip


def graph(stage: Stage) -> None:
    """A step makes no host wait; each replay of a captured step takes exactly one step, or none if found_inf is set."""
    if stage.device == "cpu":
        stage.row("CUDA graph", skipped="needs CUDA")
        return
    params = [torch.nn.Parameter(torch.ones(size, device="cuda")) for size in (70, 3, 5)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Lion(params, lr=torch.tensor(0.5, device="cuda"), implementation="triton", count_steps=True)
    multiplier, found = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    optimizer.step(grad_multiplier=multiplier, found_inf=found)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(grad_multiplier=multiplier, found_inf=found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = params[1].clone()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        optimizer.step(grad_multiplier=multiplier, found_inf=found)
    untouched = torch.equal(params[1], before)
    captured.replay()
    stepped = torch.equal(params[1], before - 0.5)
    found.fill_(1)
    captured.replay()
    skipped = torch.equal(params[1], before - 0.5)
    stage.row("CUDA graph", passed=untouched and stepped and skipped, capture_writes_nothing=untouched,
              replay_is_one_step=stepped, found_inf_skips=skipped)  # fmt: skip


def beyond_int32(stage: Stage) -> None:
    """Takes one step over more elements than an int32 offset reaches and compares all, in 21.5 GB and chunks of 2^24."""
    numel = (2**12 if stage.rehearse else 2**31) + 16
    chunk = 2**8 if stage.rehearse else 2**24
    device = stage.device

    def start(first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and bf16 gradients of a chunk, seeded by its offset, so that the reference draws the same again."""
        generator = torch.Generator(device).manual_seed(first)
        weights, gradients = (torch.randn(length, generator=generator, device=device) for _ in range(2))
        return weights.bfloat16(), gradients.bfloat16()

    bounds = [(first, min(chunk, numel - first)) for first in range(0, numel, chunk)]
    param = torch.nn.Parameter(torch.empty(numel, dtype=torch.bfloat16, device=device))
    grad = torch.empty(numel, dtype=torch.bfloat16, device=device)
    for first, length in bounds:
        param.data[first : first + length], grad[first : first + length] = start(first, length)
    param.decoupled_grad = grad
    hyper = {"lr": 2.0**-9, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = Lion([param], master_weights="split32", implementation="triton", **hyper)
    optimizer.step()
    state, wrong = optimizer.state[param], 0
    for first, length in bounds:
        part = slice(first, first + length)
        weights, gradients = start(first, length)
        expected = torch.nn.Parameter(weights.float())
        expected.grad = gradients.float()
        reference = Lion([expected], implementation="reference", **hyper)
        reference.step()
        high, low = split_master(expected.detach(), "split32")
        same = same_bits(param.detach()[part], high) and torch.equal(state["master_param"][part], low)
        wrong += not (same and same_bits(state["exp_avg"][part], reference.state[expected]["exp_avg"]))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    stage.row(
        "2^31 + 16 elements", passed=wrong == 0, elements=numel, chunks=len(bounds), wrong_chunks=wrong, peak_gib=peak
    )
