"""Helpers of the stages that train: runs on random tokens, steps, fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_step import random_data, take_step

from megatron_lion.config import RunConfig
from megatron_lion.determinism import deterministic
from megatron_lion.device import Device
from megatron_lion.parallel import Ranks
from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint
from megatron_lion.train.run import Run, build_run


def random_tokens(folder: Path, vocab_size: int, seq_length: int) -> str:
    """A dataset of random tokens, whose values do not matter to a comparison of bits."""
    return random_data(folder, "gpt2", seq_length, vocab_size=vocab_size)


@contextmanager
def built(config: RunConfig, device: Device, ranks: Ranks) -> Iterator[tuple[Run, Iterator[Any]]]:
    """A run and its batches, deterministic if the config asks for it."""
    with deterministic(config.train.deterministic):
        run = build_run(config, device, ranks)
        yield run, run.train_batches()


def fingerprints(run: Run) -> tuple[str, str]:
    """Fingerprints of the master weights with optimizer state, and of the model's weights."""
    return state_fingerprint(run.model, run.optimizer), weights_fingerprint(run.model)


__all__ = ["built", "fingerprints", "random_tokens", "take_step"]
