"""Costs against the number of parameters, documents, checkpoints and ranks: one row for each size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .costs import Row, metered, metered_parts

# Layers, width and vocabulary.
MODELS = {"0.7m": (2, 128, 2000), "2.7m": (2, 256, 4000), "10m": (3, 448, 6000), "35m": (6, 640, 8000)}
QUICK_MODELS = {"0.1m": (2, 64, 500), "0.3m": (2, 96, 1000)}
DOCUMENTS, QUICK_DOCUMENTS = (10_000, 100_000, 500_000), (200, 800)
CHECKPOINTS, QUICK_CHECKPOINTS = (5, 50, 500), (2, 4)
RANKS, QUICK_RANKS = (1, 2, 4), (1, 2)


def parameters(folder: Path, quick: bool) -> Iterator[Row]:
    """The optimizer's section of a step, a save, a verification and a restore, over the number of parameters."""
    for name, (layers, hidden, vocabulary) in (QUICK_MODELS if quick else MODELS).items():
        count = 12 * layers * hidden**2 + (vocabulary + 64) * hidden
        yield {"parameters": count, **metered_parts("training", folder / name, layers, hidden, vocabulary)}


def documents(folder: Path, quick: bool) -> Iterator[Row]:
    """Writing and opening token files, building the index, and 200 samples, over the number of documents."""
    for count in QUICK_DOCUMENTS if quick else DOCUMENTS:
        yield {"documents": count, **metered_parts("corpus", folder / str(count), count)}


def checkpoints(folder: Path, quick: bool) -> Iterator[Row]:
    """Listing, opening and verifying, `pretrain` of the finished run and `compare`, over the number of checkpoints."""
    metered_parts("corpus", folder / "data", 400)
    for count in QUICK_CHECKPOINTS if quick else CHECKPOINTS:
        run = folder / f"run{count}"
        words = [sys.executable, "-m", "megatron_lion"]
        settings = {
            "run_dir": run, "device": "cpu", "data.path": f"[{folder / 'data' / 'corpus'}]", "data.split": "98,1,1",
            "model.num_layers": 1, "model.hidden_size": 16, "model.num_attention_heads": 1, "model.vocab_size": 1000,
            "model.seq_length": 16, "train.steps": count, "train.micro_batch_size": 1, "train.global_batch_size": 1,
            "train.test_every": 0, "probe.every": 0, "checkpoint.every": 0, "checkpoint.at_steps": "[]",
            "schedule.warmup_steps": 0,
        }  # fmt: skip
        train = [
            *words,
            "pretrain",
            "gpt2-tiny",
            *(str(one) for key, value in settings.items() for one in (f"--{key}", value)),
        ]
        metered(train)
        metered_parts("multiply", folder / f"multiply{count}", run)
        again = metered(train)
        compared = metered([*words, "compare", str(run), "--output", str(folder / f"report{count}")])
        figures = metered_parts("checkpoints", folder / f"parts{count}", run)
        yield {
            "checkpoints": count, **figures, "pretrain_cpu_s": again["cpu_s"], "pretrain_peak_mb": again["peak_mb"],
            "compare_cpu_s": compared["cpu_s"], "compare_peak_mb": compared["peak_mb"],
        }  # fmt: skip


def ranks(folder: Path, quick: bool) -> Iterator[Row]:
    """The start of a job and a save, over the number of processes; the peak is that of the largest process."""
    layers, hidden, vocabulary = QUICK_MODELS["0.1m"] if quick else MODELS["2.7m"]
    for count in QUICK_RANKS if quick else RANKS:
        yield {
            "ranks": count,
            **metered_parts("training", folder / str(count), layers, hidden, vocabulary, processes=count),
        }
