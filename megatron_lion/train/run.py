"""The `Run` object (settings, model, optimizer, data), the function that builds it, and saving its state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config
from megatron_lion.data.batches import RepeatedBatches, micro_batches
from megatron_lion.data.corpora import Corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.data.node_opening import open_once_a_node
from megatron_lion.data.probe_samples import ProbeSamples, open_probe_samples
from megatron_lion.device import Device
from megatron_lion.model.build import build_model, build_objective
from megatron_lion.model.objective import Objective
from megatron_lion.optim.distributed_optimizer import StatefulDistributedOptimizer
from megatron_lion.optim.train_optimizer import TrainOptimizer, build_optimizer
from megatron_lion.parallel import Ranks, derive_seed, seed_everything
from megatron_lion.peers import alone
from megatron_lion.runs.identity import deciding_settings
from megatron_lion.runs.steps import Checkpoint
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint
from megatron_lion.train.model_state import load_weights, model_facts, model_sharded_state
from megatron_lion.train.random_state import rng_state
from megatron_lion.train.step import ForwardStep


@dataclass
class Run:
    """Everything the training loop needs.

    Attributes:
        config, device, ranks: settings, device and ranks of this process.
        model: DDP-wrapped chunks.
        optimizer: from `build_optimizer`.
        corpora: the checked data.
        datasets: Megatron's train, validation and test datasets; None for a dataset that is not used.
        probe_samples: samples of the full-gradient probe, in a separate shuffle; None if no probe runs.
        probe_weight: the objective's weights over all samples of a probe; None until they are computed.
        objective: the loss that the model minimises.
        step: number of optimizer steps attempted; the position in the data and in the schedule.
        consumed_samples: number of training samples read.
        run_id: the run's random id, which its checkpoints carry; None outside of `pretrain`.
    """

    config: RunConfig
    device: Device
    ranks: Ranks
    model: list[Any]
    optimizer: TrainOptimizer
    corpora: Corpora
    datasets: list[Any]
    objective: Objective
    probe_samples: ProbeSamples | None = None
    probe_weight: torch.Tensor | None = None
    step: int = 0
    consumed_samples: int = 0
    run_id: str | None = None
    _held_out: RepeatedBatches | None = field(default=None, init=False)

    @property
    def forward_step(self) -> ForwardStep:
        return self.objective.forward_step

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def num_probe_batches(self) -> int:
        """Number of global batches of a probe; the run must have probe samples."""
        assert self.probe_samples is not None
        return self.probe_samples.num_batches

    def train_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields this rank's micro-batches from the next unread sample to the last sample of the run."""
        end = self.config.train.steps * self.config.train.global_batch_size
        batches = self._batches(self.datasets[0], self.consumed_samples, end)
        return self.objective.weigh_steps(batches, self.config.num_microbatches(self.ranks.world_size))

    def held_out_batches(self, split: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the same held-out micro-batches at every call; split 1 is validation, 2 is test."""
        if self._held_out is None:
            end = self.config.train.test_batches * self.config.train.global_batch_size
            self._held_out = RepeatedBatches(self.datasets, end=end, **self._reading())
        return self._held_out.read(split)

    def close(self) -> None:
        """Ends the processes that read held-out samples; the next reading starts others."""
        if self._held_out is not None:
            self._held_out.close()
            self._held_out = None

    def probe_batches(self, step: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the micro-batches of a probe, independent of the training data position; a collective call.

        Args:
            step: the step whose samples are read, by default this one. Only "fresh" samples depend on it.
        """
        assert self.probe_samples is not None
        end = self.num_probe_batches * self.config.train.global_batch_size
        dataset = self.probe_samples.at(self.step if step is None else step)
        if self.probe_weight is None or self.config.probe.data == "fresh":
            self.probe_weight = self.objective.weight(self._batches(dataset, 0, end))
        return self.objective.weighed(self._batches(dataset, 0, end), self.probe_weight)

    def _batches(self, dataset: Any, start: int, end: int) -> Iterator[dict[str, torch.Tensor]]:
        return micro_batches(dataset, start=start, end=end, **self._reading())

    def _reading(self) -> dict[str, Any]:
        """The arguments that all readers of samples have in common."""
        return {
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batch_size": self.config.micro_batch_size,
            "ranks": self.ranks,
            "device": self.device,
            "num_workers": self.config.data.num_workers,
            "vocab_size": self.corpora.vocab_size,
            "timeout_s": self.config.parallel.timeout_s,
        }


def build_run(
    config: RunConfig,
    device: Device,
    ranks: Ranks,
    *,
    for_training: bool = True,
    for_probing: bool = False,
    imported: Checkpoint | None = None,
) -> Run:
    """Opens the data, builds model and optimizer and seeds dropout; a collective call.

    Args:
        config, device, ranks: settings, device and ranks of this process.
        for_training: whether to build the training and held-out datasets.
        for_probing: whether to open the probe's samples also if the run does not probe while it trains.
        imported: checkpoint with initial weights (see `is_import`), or None for random ones.

    Raises:
        ConfigError, DataError: the settings or the data are invalid.
        CheckpointError: the imported weights are damaged or belong to another model.
    """
    train = config.train
    cache = Path(config.data.cache) if config.data.cache else Path(config.run_dir) / "cache"
    corpora = open_once_a_node(config.data, config.model, cache)
    held_out = train.test_batches * train.global_batch_size if train.test_every else 0
    datasets: list[Any] = [None, None, None]
    probe_samples = None
    # The first rank builds it. At a large corpus this takes minutes, in C++ that holds Python's lock.
    with alone("building the sample index", mute=True):
        if for_training:
            datasets = build_datasets(
                corpora, config.model, [train.steps * train.global_batch_size, held_out, held_out],
                seed=derive_seed(config.seed, "data"), cache=cache,
            )  # fmt: skip
        if config.probe.mode == "frozen" and (config.probe.every or for_probing):
            probe_samples = open_probe_samples(
                corpora, config.model, config.probe, train.global_batch_size, seed=config.seed, cache=cache
            )
    seed_everything(config.seed, ranks)  # for dropout; initial weights come from generators seeded by name
    model = build_model(config, device, corpora.vocab_size)
    if imported is not None:  # before the optimizer copies its master weights from the model
        load_weights(config, corpora, model, imported, ranks)
    objective = build_objective(config.model.kind)
    count = objective.usual_count(config.micro_batch_size, config.model.seq_length)
    optimizer = build_optimizer(config.optimizer, model, precision=train.precision, micro_batch_count=count)
    return Run(config, device, ranks, model, optimizer, corpora, datasets, objective, probe_samples)


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the settings as config.yaml stores them, in hexadecimal."""
    return hashlib.sha256(dump_config(config.resolved()).encode()).hexdigest()


def save_run(run: Run) -> Checkpoint:
    """Writes and commits a checkpoint of everything that determines the rest of the run; a collective call."""
    sync_parameters(run.model)  # otherwise the model's weights of the last step may not be gathered yet
    layout = run.config.checkpoint.layout
    model_state = model_sharded_state(run.model)
    sharded = {
        "model": model_state,
        "optimizer": run.optimizer.sharded_state(model_sharded_state(run.model, ""), is_loading=False, layout=layout),
    }
    tokenizer = run.corpora.tokenizer
    facts = {
        "run_id": run.run_id,
        "settings": deciding_settings(run.config),
        "consumed_samples": run.consumed_samples,
        "seed": run.config.seed,
        "layout": ckpt.layout_facts(run.ranks),
        "state_layout": layout,
        "state_form": run.optimizer.state_form(),
        "optimizer": run.optimizer.name,
        "optimizer_state": run.optimizer.extra_state(),
        "precision": run.config.train.precision,
        "model": model_facts(run.config, run.corpora.vocab_size),
        "buckets": bucket_sizes(run),
        "data_digest": run.corpora.digest,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None,
        "config_sha256": config_digest(run.config),
        "state_fingerprint": state_fingerprint(run.model, run.optimizer),
        "weights_fingerprint": weights_fingerprint(run.model),
    }
    return ckpt.save_checkpoint(run.run_dir, run.step, sharded, rng_state(), facts, run.ranks)


def bucket_sizes(run: Run) -> Any:
    """Returns the number of elements of each gradient bucket without padding, or None if the optimizer is not sharded."""
    megatron = run.optimizer.megatron
    return megatron.bucket_sizes() if isinstance(megatron, StatefulDistributedOptimizer) else None


def sync_parameters(model: list[Any]) -> None:
    """Runs the parameter all-gathers that overlap_param_gather defers to the next forward pass; a collective call."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
