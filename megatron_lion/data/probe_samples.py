"""Samples of the full-gradient probe, shuffled independently of training and without repeats in a probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lion.config import ModelConfig, ProbeConfig
from megatron_lion.data.corpora import Corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.errors import ConfigError
from megatron_lion.parallel import derive_seed

IGNORED = -100
"""Label of a sample that does not count; torch's cross-entropy ignores it by default."""

_SPLIT_NAMES = ("training", "validation", "test")


@dataclass(frozen=True)
class ProbeSamples:
    """Source of a probe's samples.

    Attributes:
        dataset: Megatron's dataset, shuffled for the probe.
        available: number of samples in one pass over it.
        seed: seed of the run for "fresh" samples, or None if every probe reads the same samples.
        num_batches: number of global batches of a probe.
        num_samples: number of samples that count in a probe; fewer than its batches hold if it reads all of a data set
            that does not fill the last batch.
        population: number of samples of the data set that the probe's samples are drawn from without repeats; None for
            a blend with given weights, which has no last sample.
    """

    dataset: Any
    available: int
    seed: int | None
    num_batches: int
    num_samples: int
    population: int | None

    def at(self, step: int) -> Any:
        """Returns the dataset whose samples 0, 1, 2, … a probe at `step` reads."""
        if self.seed is not None:
            return _Rotated(self.dataset, derive_seed(self.seed, f"probe at {step}") % self.available, self.available)
        return _Filled(self.dataset, self.num_samples) if self.num_samples == self.population else self.dataset


class _Rotated(torch.utils.data.Dataset[Any]):
    """A dataset rotated by `start` samples; a pass over it reads each sample once."""

    def __init__(self, dataset: Any, start: int, length: int) -> None:
        self.dataset, self.start, self.length = dataset, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[(self.start + index) % self.length]


class _Filled(torch.utils.data.Dataset[Any]):
    """One pass of `length` samples, followed by copies of its first ones that do not count, to fill the last batch."""

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return 2 * self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index] if index < self.length else without_loss(self.dataset[index - self.length])


def without_loss(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns a sample whose tokens and order have no part in the loss or in its counts."""
    changed = {**sample, "loss_mask": sample["loss_mask"] * 0}
    if "is_random" in sample:  # BERT's sentence order
        changed["is_random"] = np.full_like(sample["is_random"], IGNORED)
    return changed


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
        ConfigError: a probe would read samples twice; the message gives the largest possible number of batches. Or
            `probe.num_batches` is all, and the data set has no end or is smaller than a batch.
        DataError: the split has too little data for a sample.
    """
    split = 2 if probe.data == "test" else 0
    shuffle = derive_seed(seed, "probe")  # not training's seed: the probe must not follow the order of training

    def build(count: int) -> Any:
        counts = [0, 0, 0]
        counts[split] = count
        return build_datasets(corpora, model, counts, seed=shuffle, cache=cache)[split]

    weighted = corpora.weights is not None and len(corpora.weights) > 1
    if probe.num_batches == "all":
        if weighted:
            raise ConfigError(
                "probe.num_batches: all is not defined for a blend with data.weights, which has no last sample; give a "
                "number, or one path of data.path"
            )
        available = samples_in_one_pass(build(1))
        num_batches, num_samples = -(-available // global_batch_size), available
        if available < global_batch_size:
            raise ConfigError(
                f"probe.num_batches: all, but the {_SPLIT_NAMES[split]} data holds {available:,} samples of {model.seq_length:,} "
                f"tokens, fewer than a batch of {global_batch_size:,}; give a smaller train.global_batch_size or more text"
            )
        return ProbeSamples(build(available), available, None, num_batches, num_samples, available)
    needed = probe.num_batches * global_batch_size
    dataset = build(needed)
    available = samples_in_one_pass(dataset)
    if needed > available:
        raise ConfigError(
            f"probe.num_batches: {probe.num_batches:,} batches of {global_batch_size:,} are {needed:,} samples, the {_SPLIT_NAMES[split]} "
            f"data holds {available:,} of {model.seq_length:,} tokens; give at most {available // global_batch_size:,} batches"
            + ("" if weighted else ", or all")
            + ("" if probe.data != "test" else ", or probe.data fixed")
        )
    fresh = probe.data == "fresh"
    return ProbeSamples(
        build(available) if fresh else dataset, available, seed if fresh else None, probe.num_batches, needed,
        None if weighted else available,
    )  # fmt: skip


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
    if dataset.weights is None:  # a blend in proportion to the sizes reads all of every part
        return sum(map(samples_in_one_pass, parts))
    shares = [float(weight) / sum(map(float, dataset.weights)) for weight in dataset.weights]
    return int(min(samples_in_one_pass(part) / share for part, share in zip(parts, shares, strict=True)))
