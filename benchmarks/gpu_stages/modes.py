"""LION in DistributedOptimizer on one rank: compares the fused step with Megatron's fp32 shards bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lion.device import select_device
from megatron_lion.optim.layouts import PackedLayout
from megatron_lion.optim.precision import split_master
from megatron_lion.parallel import process_groups
from megatron_lion.train.run import Run

from .runs import built, fingerprints, random_tokens, take_step
from .settings import tiny_config, tiny_settings
from .stage import Stage

VOCABULARY = 1000
SHARDS, FUSED, SPLIT, HALF_UP = "Megatron's shards", "fused fp32", "fused split32", "fp32, copies rounded half up"
MODES = {SHARDS: "shards", FUSED: "fp32", HALF_UP: "fp32", SPLIT: "split32"}


def on_one_rank(stage: Stage, check: Callable[[Stage], None]) -> None:
    """Runs a check inside the process groups of one rank."""
    with process_groups(select_device(stage.device)):
        check(stage)


def compare_modes(stage: Stage) -> None:
    """Takes 20 steps (4 in a rehearsal) in each mode from the same weights and batches, without and with clipping."""
    settings = tiny_settings(stage.rehearse) | {
        "train.precision": "bf16",
        "train.steps": 4 if stage.rehearse else 20,
        "train.deterministic": True,
    }
    settings |= {"model.vocab_size": VOCABULARY, "device": stage.device, "data.split": "98,1,1"}
    with process_groups(select_device(stage.device)) as ranks:
        data = random_tokens(stage.folder / "tokens", VOCABULARY, 128)
        for clip in (0.0, 1.0):
            found = {}
            for name, master in MODES.items():
                changes = {**settings, "optimizer.clip_grad": clip, "optimizer.master_weights": master}
                config = tiny_config(stage.folder / f"{name} {clip:g}", data, changes)
                with copies_rounded_half_up() if name == HALF_UP else contextlib.nullcontext():
                    found[name] = train(config, select_device(stage.device), ranks, reference=name == HALF_UP)
            compare(stage, f"clip {clip:g}: fp32 = shards", found[FUSED], found[SHARDS])
            compare(stage, f"clip {clip:g}: split32 = half-up master", found[SPLIT], found[HALF_UP])


def check_section(stage: Stage) -> None:
    """Captures the whole optimizer's section in a CUDA graph; its replay must take the step that a plain call takes."""
    settings = tiny_settings(stage.rehearse) | {
        "train.precision": "bf16",
        "train.steps": 3,
        "train.deterministic": True,
    }
    settings |= {"model.vocab_size": VOCABULARY, "device": stage.device, "data.split": "98,1,1"}
    settings |= {"optimizer.master_weights": "split32", "optimizer.clip_grad": 0.1}
    device = select_device(stage.device)
    found = {}
    with process_groups(device) as ranks:
        data = random_tokens(stage.folder / "section tokens", VOCABULARY, 128)
        for kind in ("nothing", "call", "graph"):
            with built(tiny_config(stage.folder / f"section {kind}", data, settings), device, ranks) as (run, batches):
                for _ in range(2):
                    take_step(run, batches)  # compiles, uploads the tables, and leaves a gradient in the buffers
                if kind == "graph" and device.kind == "cuda":
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        run.optimizer.start_step()
                    graph.replay()
                elif kind != "nothing":
                    run.optimizer.start_step()
                found[kind] = fingerprints(run)
    stage.row(
        "optimizer's section in a CUDA graph", passed=found["graph"] == found["call"] != found["nothing"],
        captured=device.kind == "cuda",
    )  # fmt: skip


def train(config: Any, device: Any, ranks: Any, *, reference: bool) -> dict[str, Any]:
    """Returns losses, norms and fingerprints; with `reference`, the update uses torch operations, which the caller may patch."""
    with built(config, device, ranks) as (run, batches):
        if reference:
            run.optimizer.inner.implementation = "reference"
        apart: list[float] = []
        if config.optimizer.master_weights == "shards":
            record_upstreams_norm(run, apart)
        steps = [take_step(run, batches) for _ in range(config.train.steps)]
        state, weights = fingerprints(run)
    return {"losses": [s.loss for s in steps], "norms": [s.grad_l2 for s in steps], "state": state, "weights": weights,
            "norms_apart": apart}  # fmt: skip


def record_upstreams_norm(run: Run, apart: list[float]) -> None:
    """Records the relative difference between upstream's norm and ours, by which Megatron's shards are clipped.

    On CUDA the two norms sum in different orders.
    """
    megatron: Any = run.optimizer.megatron
    measure = megatron.step_scalars

    def recorded(*args: Any, **options: Any) -> Any:
        scalars = measure(*args, **options)
        apart.append(abs(float(megatron.get_grad_norm()) / float(scalars.norm) - 1))
        return scalars

    megatron.step_scalars = recorded


def compare(stage: Stage, part: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    first = next(
        (n for n, pair in enumerate(zip(one["losses"], other["losses"], strict=True), 1) if pair[0] != pair[1]), None
    )
    apart = max(abs(a / b - 1) for a, b in zip(one["norms"], other["norms"], strict=True))
    same = {key: one[key] == other[key] for key in ("state", "weights", "losses", "norms")}
    stage.row(part, passed=all(same[key] for key in ("state", "weights", "losses")), same_norms=same["norms"],
              first_other_loss=first, largest_norm_difference=apart, norm_at_first_step=one["norms"][0],
              upstream_norm_differs_by=max(other.get("norms_apart") or [0.0]))  # fmt: skip


@contextlib.contextmanager
def copies_rounded_half_up() -> Iterator[None]:
    """Makes fp32 masters round their bf16 copies like split masters; otherwise exact ties, 1 value in 65,536, differ."""
    encode = PackedLayout.encode

    def half_up(layout: Any, param: Any, state: Any, name: str, value: Any) -> None:
        encode(layout, param, state, name, value)
        if name == "master_param" and layout.master_weights == "fp32" and param.dtype == torch.bfloat16:
            param.copy_(split_master(state[name], "split32")[0])

    PackedLayout.encode = half_up
    try:
        yield
    finally:
        PackedLayout.encode = encode
