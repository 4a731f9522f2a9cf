"""Samples of the full-gradient probe, shuffled independently of training and without repeats in a probe."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import ModelConfig, ProbeConfig
from megatron_lion.data.corpora import Corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.errors import ConfigError
from megatron_lion.parallel import derive_seed

_SPLIT_NAMES = ("training", "validation", "test")


@dataclass(frozen=True)
class ProbeSamples:
    """Source of a probe's samples.

    Attributes:
        dataset: Megatron's dataset, shuffled for the probe.
        available: number of samples in one pass over it.
        seed: seed of the run for "fresh" samples, or None if every probe reads the same samples.
    """

    dataset: Any
    available: int
    seed: int | None

    def at(self, step: int) -> Any:
        """Returns the dataset whose samples 0, 1, 2, … a probe at `step` reads."""
        if self.seed is None:
            return self.dataset
        return _Rotated(self.dataset, derive_seed(self.seed, f"probe at {step}") % self.available, self.available)


class _Rotated(torch.utils.data.Dataset[Any]):
    """A dataset rotated by `start` samples; a pass over it reads each sample once."""

    def __init__(self, dataset: Any, start: int, length: int) -> None:
        self.dataset, self.start, self.length = dataset, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[(self.start + index) % self.length]


def open_probe_samples(
    corpora: Corpora, model: ModelConfig, probe: ProbeConfig, global_batch_size: int, *, seed: int, cache: Path
) -> ProbeSamples:
    """Builds the probe's dataset; a collective call.

    Args:
        corpora: data of the run.
        model: model settings; the kind and the sequence length are used.
        probe: probe settings; the data and the number of batches are used.
        global_batch_size: samples of a batch.
        seed: seed of the run.
        cache: folder for the index files.

    Raises:
        ConfigError: a probe would read samples twice; the message gives the largest possible number of batches.
        DataError: the split has too little data for a sample.
    """
    split = 2 if probe.data == "test" else 0
    needed = probe.num_batches * global_batch_size
    shuffle = derive_seed(seed, "probe")  # not training's seed: the probe must not follow the order of training

    def build(count: int) -> Any:
        counts = [0, 0, 0]
        counts[split] = count
        return build_datasets(corpora, model, counts, seed=shuffle, cache=cache)[split]

    dataset = build(needed)
    available = samples_in_one_pass(dataset)
    if needed > available:
        raise ConfigError(
            f"probe.num_batches: {probe.num_batches:,} batches of {global_batch_size:,} are {needed:,} samples, the {_SPLIT_NAMES[split]} "
            f"data holds {available:,} of {model.seq_length:,} tokens; give at most {available // global_batch_size:,} batches"
            + ("" if probe.data != "test" else ", or probe.data fixed")
        )
    if probe.data != "fresh":
        return ProbeSamples(dataset, available, None)
    return ProbeSamples(build(available), available, seed)


def samples_in_one_pass(dataset: Any) -> int:
    """Returns the number of samples of a Megatron dataset before any text repeats; for a blend, in any of its parts."""
    dataset = getattr(dataset, "first", dataset)  # of SeveralPasses
    parts = getattr(dataset, "datasets", None)
    if parts is None:
        if hasattr(dataset, "samples_in_one_pass"):
            return int(dataset.samples_in_one_pass)
        # GPT: a sample of S tokens needs the token after it as its last label, hence the - 1.
        lengths = dataset.dataset.sequence_lengths[dataset.indices]
        return max(0, (int(lengths.sum()) - 1) // int(dataset.config.sequence_length))
    weights = dataset.weights if dataset.weights is not None else [_size(part) for part in parts]
    shares = [float(weight) / sum(map(float, weights)) for weight in weights]
    return int(min(samples_in_one_pass(part) / share for part, share in zip(parts, shares, strict=True)))


def _size(dataset: Sized) -> int:
    return len(dataset)
