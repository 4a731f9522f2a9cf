"""Stage `bert`: BERT-Base and BERT-Small with the real loader and with ready batches: the cost of the loader."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from train_step import MODELS, configure, random_data, time_run

from megatron_lion.device import Device, select_device
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.train.run import Run, build_run

from .stage import Stage

OPTIMIZER = "lion split32"
REHEARSAL = {"model.num_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2}
REHEARSAL_WORDS = 500


def run(stage: Stage) -> None:
    device = select_device(stage.device)
    models = ("bert-tiny",) if stage.rehearse else ("bert-base", "bert-small")
    with process_groups(device) as ranks:
        words = REHEARSAL_WORDS if stage.rehearse else None
        data = random_data(stage.folder / "tokens", "bert", 128 if stage.rehearse else 512, vocab_size=words)
        for model in models:
            found: dict[str, float] = {}
            for source in ("ready batches", "real loader"):
                stage.attempt(
                    f"{model}, {source}", 7,
                    lambda m=model, s=source, f=found: measure(stage, m, s, data, device, ranks, f),
                )  # fmt: skip


def measure(
    stage: Stage, model: str, source: str, data: str, device: Device, ranks: Ranks, found: dict[str, float]
) -> None:
    """Measures tokens/s with batches from `source`; the loader's row has its ratio to the rate with ready batches."""
    torch.compiler.reset()
    warmup, steps = (1, 3) if stage.rehearse else (4, 12)
    args = Namespace(micro_batch_size=2 if stage.rehearse else MODELS[model][1], num_microbatches=2,
                     warmup=warmup, steps=steps - warmup, data=None)  # fmt: skip
    changes: dict[str, Any] = {"log.progress": False, **(REHEARSAL if stage.rehearse else {})}
    config = configure(args, model, OPTIMIZER, data, stage.folder / f"{model} {source}", device, changes)
    built = build_run(config, device, ranks)
    batches = built.train_batches() if source == "real loader" else ready_batches(built)
    figures = time_run(built, batches, warmup, steps)
    found[source] = figures["tokens_per_s"]
    share = found[source] / found["ready batches"] if "ready batches" in found else None
    stage.row(f"{model}, {source}", tokens_per_s=figures["tokens_per_s"], of_ready_batches=share, mfu=figures["mfu"],
              num_workers=2 if device.kind == "cuda" else 0,
              **{key: value for key, value in figures.items() if key not in ("tokens_per_s", "mfu")})  # fmt: skip


def ready_batches(run: Run) -> Iterator[Any]:
    """The micro-batches of the first step, on the device, repeated without end."""
    batches = run.train_batches()
    first = list(itertools.islice(batches, run.config.num_microbatches(run.ranks.world_size)))
    return itertools.cycle(first)
