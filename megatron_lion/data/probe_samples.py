"""The samples of the full-gradient probe: a shuffle of its own, never repeated within a probe, independent of training."""

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
    """Where a probe draws from.

    Attributes:
        dataset: Megatron's dataset, shuffled for the probe.
        available: samples in one pass over it.
        seed: of the run, for "fresh" samples; None where every probe reads the same.
    """

    dataset: Any
    available: int
    seed: int | None

    def at(self, step: int) -> Any:
        """The dataset whose samples 0, 1, 2, … a probe at `step` reads."""
        if self.seed is None:
            return self.dataset
        return _Rotated(self.dataset, derive_seed(self.seed, f"probe at {step}") % self.available, self.available)


class _Rotated(torch.utils.data.Dataset[Any]):
    """A dataset that begins at another sample and goes round: no sample comes twice in one pass."""

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
        corpora: the run's data.
        model: for the sequence length.
        probe: which data, and how many batches.
        global_batch_size: samples a batch.
        seed: of the run.
        cache: folder for the index files.

    Raises:
        ConfigError: a probe would read samples twice; says how many batches there are.
    """
    split = 2 if probe.data == "test" else 0
    needed = probe.num_batches * global_batch_size
    shuffle = derive_seed(seed, "probe")

    def build(count: int) -> Any:
        counts = [0, 0, 0]
        counts[split] = count
        return build_datasets(corpora, model, counts, seed=shuffle, cache=cache)[split]

    dataset = build(needed)
    available = samples_in_one_pass(dataset)
    if needed > available:
        raise ConfigError(
            f"probe.num_batches: {probe.num_batches:,} batches of {global_batch_size:,} are {needed:,} samples, the {_SPLIT_NAMES[split]} "
            f"data holds {available:,} of {model.seq_length:,} tokens: at most {available // global_batch_size:,} batches"
            + ("" if probe.data != "test" else ", or probe.data fixed")
        )
    if probe.data != "fresh":
        return ProbeSamples(dataset, available, None)
    return ProbeSamples(build(available), available, seed)


def samples_in_one_pass(dataset: Any) -> int:
    """Samples of a Megatron dataset before any text comes again; of a blend, before that happens in any part."""
    parts = getattr(dataset, "datasets", None)
    if parts is None:
        if hasattr(dataset, "samples_in_one_pass"):
            return int(dataset.samples_in_one_pass)
        lengths = dataset.dataset.sequence_lengths[dataset.indices]
        return max(0, (int(lengths.sum()) - 1) // int(dataset.config.sequence_length))
    weights = dataset.weights if dataset.weights is not None else [_size(part) for part in parts]
    shares = [float(weight) / sum(map(float, weights)) for weight in weights]
    return int(min(samples_in_one_pass(part) / share for part, share in zip(parts, shares, strict=True)))


def _size(dataset: Sized) -> int:
    return len(dataset)
