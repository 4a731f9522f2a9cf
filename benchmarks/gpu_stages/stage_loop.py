"""Stage `loop`: tokens/s of the whole training loop of GPT-2 in bf16, and the breakdown of a step's time."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from optimizer_step import host_waits
from train_step import configure, random_data, take_step, time_run

from megatron_lion.device import Device, select_device
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.train.run import build_run

from .breakdown import profile_steps
from .stage import Stage


@dataclass(frozen=True)
class Variant:
    """A timed case: keys of train_step.MODELS and OPTIMIZERS, samples per micro-batch, dropout, kinds of
    operations, seconds on an H100.

    `fusion` is `train.gradient_accumulation_fusion`.
    """

    name: str
    samples: int
    dropout: float
    optimizer: str = "lion split32"
    model: str = "gpt2-124m"
    loss: str = "auto"
    elementwise: str = "auto"
    attention: str = "auto"
    fusion: str = "auto"
    needs_s: float = 18.0


# nanoGPT and llm.c measure with dropout 0; our configs have 0.1. megatron-core's loss, its element-wise operations and its
# fp32 shards are the code paths without the fused ones: each row is compared with the first one.
VARIANTS = (
    Variant("micro-batch 16, dropout 0", 16, 0.0),
    Variant("micro-batch 16, dropout 0.1", 16, 0.1),
    Variant("megatron-core's loss, micro-batch 16, dropout 0", 16, 0.0, loss="megatron"),
    Variant("megatron-core's element-wise operations, micro-batch 16, dropout 0", 16, 0.0, elementwise="megatron"),
    Variant("micro-batch 8, dropout 0", 8, 0.0),
    Variant("355M, micro-batch 8, dropout 0", 8, 0.0, model="gpt2-355m", needs_s=25.0),
    Variant("16-bit weight gradients, micro-batch 16, dropout 0", 16, 0.0, fusion="false"),
    Variant("fp32 shards, micro-batch 16, dropout 0", 16, 0.0, optimizer="lion fp32 shards + copy"),
    Variant("chunked loss, micro-batch 16, dropout 0", 16, 0.0, loss="chunked"),
    Variant("cuDNN's attention, micro-batch 16, dropout 0", 16, 0.0, attention="cudnn"),
    Variant("micro-batch 8, dropout 0.1", 8, 0.1),
)
REHEARSED = 1
PROFILED = 3
REHEARSAL = {
    "model.num_layers": 2, "model.hidden_size": 32, "model.num_attention_heads": 2, "model.seq_length": 32,
    "model.vocab_size": 500,
}  # fmt: skip


def run(stage: Stage) -> None:
    device = select_device(stage.device)
    with process_groups(device) as ranks:
        data = random_data(stage.folder / "tokens", "gpt2", 1024, vocab_size=500 if stage.rehearse else None)
        for variant in VARIANTS[:REHEARSED] if stage.rehearse else VARIANTS:
            stage.attempt(variant.name, variant.needs_s, lambda v=variant: measure(stage, v, data, device, ranks))


def measure(stage: Stage, variant: Variant, data: str, device: Device, ranks: Ranks) -> None:
    """Measures medians of 15 steps after 5, then a profile of 3 steps, then the host waits of one step."""
    # mcore's fusions are compiled by shape; without a reset a second shape compiles them for dynamic shapes: slower.
    torch.compiler.reset()
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warmup, steps = (1, 3) if stage.rehearse else (5, 20)
    args = Namespace(micro_batch_size=2 if stage.rehearse else variant.samples, num_microbatches=2 if stage.rehearse else 5,
                     warmup=warmup, steps=steps - warmup, data=None)  # fmt: skip
    changes: dict[str, Any] = {
        "train.steps": steps + PROFILED + 1, "model.hidden_dropout": variant.dropout,
        "model.attention_dropout": variant.dropout, "model.loss": variant.loss,
        "model.elementwise": variant.elementwise, "model.attention": variant.attention, "log.progress": False,
        "train.gradient_accumulation_fusion": variant.fusion,
        **(REHEARSAL if stage.rehearse else {}),
    }  # fmt: skip
    model = "gpt2-tiny" if stage.rehearse else variant.model
    folder = stage.folder / variant.name.replace(" ", "-")
    built = build_run(configure(args, model, variant.optimizer, data, folder, device, changes), device, ranks)
    batches = built.train_batches()
    figures = time_run(built, batches, warmup, steps)
    first = {key: figures.pop(key) for key in ("tokens_per_s", "mfu", "step_ms", "section_ms")}
    stage.row(
        variant.name, **first, **figures, dropout=variant.dropout, optimizer=variant.optimizer, loss=variant.loss,
        elementwise=variant.elementwise, adds_in_the_product=built.model[0].config.gradient_accumulation_fusion,
    )  # fmt: skip
    profile = profile_steps(built, lambda: take_step(built, batches), PROFILED)
    # The profiler slows the host, so the idle time is computed from the step time without it.
    idle = first["step_ms"] - profile["busy_ms"] if device.kind == "cuda" else None
    buckets = sum(len(buffer.buckets) for buffer in built.optimizer.megatron.buffers)
    launches = profile["launches"]
    stage.row(
        f"{variant.name}: profile", **profile["ms"], idle=idle, busy_ms=profile["busy_ms"], launches=launches,
        buckets=buckets, optimizer_launches_beyond_buckets=launches["optimizer"] - buckets if launches else None,
    )  # fmt: skip
    if device.kind == "cuda":
        waits = host_waits(lambda: take_step(built, batches))
        stage.row(f"{variant.name}: host waits", waits=sum(waits.values()), by_line=waits)
