"""Stage `loop`: tokens/s of the whole training loop, GPT-2 124M in bf16 with `split32`, and where a step's time goes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from train_step import configure, random_data, take_step, time_run

from megatron_lion.device import Device, select_device
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.train.run import build_run

from .breakdown import profile_steps
from .stage import Stage

# (samples a micro-batch, dropout). Dropout 0 is what nanoGPT and llm.c measure; 0.1 is what the configs ship.
VARIANTS = ((16, 0.0), (16, 0.1), (8, 0.0), (8, 0.1))
LARGER = "355M, micro-batch 8, dropout 0"
OPTIMIZER = "lion split32"
PROFILED = 3
REHEARSAL = {
    "model.num_layers": 2, "model.hidden_size": 32, "model.num_attention_heads": 2, "model.seq_length": 32,
    "model.vocab_size": 500,
}  # fmt: skip


def run(stage: Stage) -> None:
    device = select_device(stage.device)
    with process_groups(device) as ranks:
        data = random_data(stage.folder / "tokens", "gpt2", 1024, vocab_size=500 if stage.rehearse else None)
        for samples, dropout in VARIANTS[:2] if stage.rehearse else VARIANTS:
            name = f"micro-batch {samples}, dropout {dropout:g}"
            stage.attempt(name, 18, lambda n=name, s=samples, d=dropout: measure(stage, n, s, d, data, device, ranks))
        if not stage.rehearse:
            stage.attempt(LARGER, 25, lambda: measure(stage, LARGER, 8, 0.0, data, device, ranks, "gpt2-355m"))


def measure(
    stage: Stage,
    name: str,
    samples: int,
    dropout: float,
    data: str,
    device: Device,
    ranks: Ranks,
    model: str = "gpt2-124m",
) -> None:
    """Medians of 15 steps after 5, then a profile of 3 more."""
    # mcore's fusions are compiled by shape; without this a second shape compiles them for any shape, and slower.
    torch.compiler.reset()
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warmup, steps = (1, 3) if stage.rehearse else (5, 20)
    args = Namespace(micro_batch_size=2 if stage.rehearse else samples, num_microbatches=2 if stage.rehearse else 5,
                     warmup=warmup, steps=steps - warmup, data=None)  # fmt: skip
    changes: dict[str, Any] = {
        "train.steps": steps + PROFILED, "model.hidden_dropout": dropout, "model.attention_dropout": dropout,
        "log.progress": False, **(REHEARSAL if stage.rehearse else {}),
    }  # fmt: skip
    config = configure(
        args,
        "gpt2-tiny" if stage.rehearse else model,
        OPTIMIZER,
        data,
        stage.folder / name.replace(" ", "-"),
        device,
        changes,
    )
    built = build_run(config, device, ranks)
    batches = built.train_batches()
    figures = time_run(built, batches, warmup, steps)
    stage.row(name, tokens_per_s=figures["tokens_per_s"], mfu=figures["mfu"], dropout=dropout,
              **{key: value for key, value in figures.items() if key not in ("tokens_per_s", "mfu")})  # fmt: skip
    profile = profile_steps(built, lambda: take_step(built, batches), PROFILED)
    # The profiler slows the host, so the idle time is taken from the step without it.
    idle = figures["step_ms"] - profile["busy_ms"] if device.kind == "cuda" else None
    buckets = sum(len(buffer.buckets) for buffer in built.optimizer.megatron.buffers)  # type: ignore[attr-defined]
    launches = profile["launches"]
    stage.row(
        f"{name}: profile", **profile["ms"], idle=idle, busy_ms=profile["busy_ms"], launches=launches, buckets=buckets,
        optimizer_launches_beyond_buckets=launches["optimizer"] - buckets if launches else None,
    )  # fmt: skip
