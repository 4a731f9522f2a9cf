"""One object that holds a run, built by one function and passed explicitly; saving and restoring its state."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import Float16Module

from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config
from megatron_lion.data.corpora import Corpora, open_corpora
from megatron_lion.data.datasets import build_datasets, micro_batches
from megatron_lion.data.probe_samples import ProbeSamples, open_probe_samples
from megatron_lion.device import Device
from megatron_lion.errors import CheckpointError
from megatron_lion.model.build import build_model, build_objective
from megatron_lion.model.objective import Objective
from megatron_lion.optim.distributed_optimizer import StatefulDistributedOptimizer
from megatron_lion.optim.train_optimizer import TrainOptimizer, build_optimizer
from megatron_lion.parallel import Ranks, agree, derive_seed, seed_everything
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint
from megatron_lion.train.step import ForwardStep

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop works with.

    Attributes:
        config, device, ranks: settings and place.
        model: DDP-wrapped chunks.
        optimizer: what `build_optimizer` made.
        corpora: the checked data.
        datasets: Megatron's train, validation and test datasets (None where not needed).
        probe_samples: what the full-gradient probe reads, a shuffle of its own (None where no probe runs).
        probe_weight: what the loss must know about all samples of a probe together, once it was found.
        objective: what the model minimises.
        step: optimizer steps attempted so far; position in the data and the schedule.
        consumed_samples: training samples read so far.
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

    @property
    def forward_step(self) -> ForwardStep:
        return self.objective.forward_step

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def train_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches from the next unread sample to the last of the run."""
        end = self.config.train.steps * self.config.train.global_batch_size
        batches = self._batches(self.datasets[0], self.consumed_samples, end)
        return self.objective.weigh_steps(batches, self.config.num_microbatches(self.ranks.world_size))

    def held_out_batches(self, split: int) -> Iterator[dict[str, torch.Tensor]]:
        """The same held-out samples every time: split 1 is validation, 2 is test."""
        return self._batches(
            self.datasets[split], 0, self.config.train.test_batches * self.config.train.global_batch_size
        )

    def probe_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """What a probe at this step reads, independent of what training has read; a collective call."""
        assert self.probe_samples is not None
        end = self.config.probe.num_batches * self.config.train.global_batch_size
        dataset = self.probe_samples.at(self.step)
        if self.probe_weight is None or self.config.probe.data == "fresh":
            self.probe_weight = self.objective.weight(self._batches(dataset, 0, end))
        return self.objective.weighed(self._batches(dataset, 0, end), self.probe_weight)

    def _batches(self, dataset: Any, start: int, end: int) -> Iterator[dict[str, torch.Tensor]]:
        train = self.config.train
        return micro_batches(
            dataset,
            start=start,
            end=end,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            ranks=self.ranks,
            device=self.device,
            num_workers=self.config.data.num_workers,
            vocab_size=self.corpora.vocab_size,
        )


def build_run(
    config: RunConfig,
    device: Device,
    ranks: Ranks,
    *,
    for_training: bool = True,
    imported: ckpt.Checkpoint | None = None,
) -> Run:
    """Opens the data, builds model and optimizer and seeds dropout; a collective call.

    Args:
        config, device, ranks: settings and place.
        for_training: without it there are samples for probes only.
        imported: weights to begin with (see `is_import`) in place of random ones.
    """
    with agree("opening the data"):
        corpora = open_corpora(config.data, config.model)
    train = config.train
    cache = Path(config.data.cache) if config.data.cache else Path(config.run_dir) / "cache"
    held_out = train.test_batches * train.global_batch_size if train.test_every else 0
    datasets: list[Any] = [None, None, None]
    if for_training:
        datasets = build_datasets(
            corpora, config.model, [train.steps * train.global_batch_size, held_out, held_out],
            seed=derive_seed(config.seed, "data"), cache=cache,
        )  # fmt: skip
    probe_samples = None
    if config.probe.mode == "frozen" and (config.probe.every or not for_training):
        probe_samples = open_probe_samples(
            corpora, config.model, config.probe, train.global_batch_size, seed=config.seed, cache=cache
        )
    seed_everything(config.seed, ranks)
    model = build_model(config, device, corpora.vocab_size)
    if imported is not None:  # before the optimizer takes its master weights from the model
        _load_weights(config, corpora, model, imported, ranks)
    optimizer = build_optimizer(config.optimizer, model, precision=train.precision)
    return Run(
        config, device, ranks, model, optimizer, corpora, datasets, build_objective(config.model.kind), probe_samples
    )


def unwrap(chunk: Any) -> Any:
    """The megatron-core network inside DDP and the half-precision wrapper."""
    core = chunk.module
    return core.module if isinstance(core, Float16Module) else core


def model_sharded_state(model: list[Any], prefix: str = "model.") -> dict[str, Any]:
    """The model's parameters as megatron-core ShardedTensors whose data are the Parameter objects; no pickled extras."""
    items = {key: item for chunk in model for key, item in unwrap(chunk).sharded_state_dict(prefix=prefix).items()}
    return {key: item for key, item in items.items() if isinstance(item, ShardedTensor)}


def config_digest(config: RunConfig) -> str:
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


def save_run(run: Run) -> ckpt.Checkpoint:
    """Writes and commits a checkpoint of everything that decides how the run goes on; a collective call."""
    sync_parameters(run.model)
    layout = run.config.checkpoint.layout
    model_state = model_sharded_state(run.model)
    sharded = {
        "model": model_state,
        "optimizer": run.optimizer.sharded_state(model_sharded_state(run.model, ""), is_loading=False, layout=layout),
    }
    tokenizer = run.corpora.tokenizer
    facts = {
        "consumed_samples": run.consumed_samples,
        "seed": run.config.seed,
        "layout": ckpt.layout_facts(run.ranks),
        "state_layout": layout,
        "state_form": run.optimizer.state_form(),
        "optimizer": run.optimizer.name,
        "optimizer_state": run.optimizer.extra_state(),
        "precision": run.config.train.precision,
        "model": model_facts(run.config, run.corpora.vocab_size),
        "buckets": _buckets(run),
        "data_digest": run.corpora.digest,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None,
        "config_sha256": config_digest(run.config),
        "state_fingerprint": state_fingerprint(run.model, run.optimizer),
        "weights_fingerprint": weights_fingerprint(run.model),
    }
    return ckpt.save_checkpoint(run.run_dir, run.step, sharded, rng_state(), facts, run.ranks)


def restore_run(run: Run, checkpoint: ckpt.Checkpoint) -> None:
    """Verifies a checkpoint and puts model, optimizer, counters and random states back; a collective call.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, optimizer or data; nothing was changed on disk.
    """
    manifest = checkpoint.manifest
    with agree("checking the checkpoint"):
        _check_model(run.config, run.corpora, checkpoint)
        _check_state(run, checkpoint)
    ckpt.verify_checkpoint(checkpoint, run.ranks)
    layout = manifest["state_layout"]
    model_state = model_sharded_state(run.model)
    sharded = {
        "model": model_state,
        "optimizer": run.optimizer.sharded_state(model_sharded_state(run.model, ""), is_loading=True, layout=layout),
    }
    loaded = ckpt.read_tensors(sharded, checkpoint.folder)
    load_model_tensors(run.model, loaded["model"])
    run.optimizer.load_sharded_state(loaded["optimizer"], layout=layout)
    run.optimizer.load_extra_state(manifest["optimizer_state"])
    run.step = int(manifest["step"])
    run.consumed_samples = int(manifest["consumed_samples"])
    rng = ckpt.read_rng(checkpoint, run.ranks)
    # A CUDA generator's state is 16 bytes, a CPU generator's 5,056: neither can be set on the other kind of device.
    if rng is not None and ("cuda" in rng) == torch.cuda.is_available():
        set_rng_state(rng)
    else:  # another layout or kind of device has other dropout streams: start fresh ones that depend on the step
        seed_everything(derive_seed(run.config.seed, f"resume at {run.step}"), run.ranks)
    _compare_fingerprints(run, checkpoint)


def _compare_fingerprints(run: Run, checkpoint: ckpt.Checkpoint) -> None:
    """Raises CheckpointError unless the restored state is the saved one, or had to be rounded to a shorter form."""
    manifest, optimizer = checkpoint.manifest, run.optimizer
    found, saved = state_fingerprint(run.model, optimizer), manifest["state_fingerprint"]
    if found == saved:
        return
    form = manifest.get("state_form", optimizer.state_form())
    same_shards = manifest["layout"] == ckpt.layout_facts(run.ranks) and manifest["buckets"] == _buckets(run)
    if not optimizer.rounds_state_of(form, same_shards=same_shards):
        raise CheckpointError(
            f"{checkpoint.folder}: the restored state has fingerprint {found[:12]}, saved was {saved[:12]}; "
            "please report this, and resume from another step"
        )
    logger.info("%s: its state is rounded to %s, from %s", checkpoint.folder, optimizer.state_form(), form)


def restore_weights(run: Run, checkpoint: ckpt.Checkpoint) -> None:
    """Verifies a checkpoint and loads the model's weights alone, at any layout; a collective call.

    Master weights and optimizer state stay as they were: for reading, not for training.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model or data.
    """
    _load_weights(run.config, run.corpora, run.model, checkpoint, run.ranks)
    run.step = int(checkpoint.manifest["step"])


def is_import(checkpoint: ckpt.Checkpoint) -> bool:
    """Whether it holds weights from elsewhere, to begin a run with: no optimizer state, no steps."""
    return checkpoint.step == 0 and checkpoint.manifest.get("state_layout") is None


def _load_weights(
    config: RunConfig, corpora: Corpora, model: list[Any], checkpoint: ckpt.Checkpoint, ranks: Ranks
) -> None:
    with agree("checking the checkpoint"):
        _check_model(config, corpora, checkpoint)
    ckpt.verify_checkpoint(checkpoint, ranks)
    loaded = ckpt.read_tensors({"model": model_sharded_state(model)}, checkpoint.folder)
    load_model_tensors(model, loaded["model"])


def why_no_state(run: Run, checkpoint: ckpt.Checkpoint) -> str | None:
    """Why a checkpoint's optimizer state, master weights included, cannot be loaded at this layout; None where it can."""
    if checkpoint.manifest.get("state_layout") is None:
        return "it holds no optimizer state"
    try:
        _check_state(run, checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def load_model_tensors(model: list[Any], tensors: dict[str, torch.Tensor]) -> None:
    """Copies loaded weights into the parameters."""
    with torch.no_grad():
        for key, target in model_sharded_state(model).items():
            target.data.copy_(tensors[key].view_as(target.data))


def _buckets(run: Run) -> Any:
    megatron = run.optimizer.megatron
    return megatron.bucket_sizes() if isinstance(megatron, StatefulDistributedOptimizer) else None


def model_facts(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit a model."""
    model = config.model
    return {
        "kind": model.kind,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "seq_length": model.seq_length,
        "gelu": model.gelu,
        "layernorm_epsilon": model.layernorm_epsilon,
        "vocab_size": vocab_size,
    }


def _check_model(config: RunConfig, corpora: Corpora, checkpoint: ckpt.Checkpoint) -> None:
    manifest, where = checkpoint.manifest, checkpoint.folder
    ours = model_facts(config, corpora.vocab_size)
    different = [
        f"{key} {manifest['model'].get(key)} (now {value})"
        for key, value in ours.items()
        if manifest["model"].get(key) != value
    ]
    if different:
        raise CheckpointError(
            f"{where}: is of another model: {', '.join(different)}; use its settings or another run_dir"
        )
    if manifest["data_digest"] is None:  # imported: the vocabulary is what must fit
        theirs, now = manifest["tokenizer_sha256"], corpora.tokenizer.sha256 if corpora.tokenizer else None
        if now is not None and theirs != now:
            raise CheckpointError(
                f"{where}: has another tokenizer ({theirs[:12]}) than the data ({now[:12]}); prepare the data with the one in "
                f"{where.parent.parent / 'tokenizer'}"
            )
    elif manifest["data_digest"] != corpora.digest:
        raise CheckpointError(
            f"{where}: was trained on other data ({manifest['data_digest'][:12]}, now {corpora.digest[:12]}); use another run_dir"
        )


def _check_state(run: Run, checkpoint: ckpt.Checkpoint) -> None:
    manifest, where = checkpoint.manifest, checkpoint.folder
    if manifest["optimizer"] != run.optimizer.name:
        raise CheckpointError(
            f"{where}: was written by {manifest['optimizer']}, optimizer.name is {run.optimizer.name}; use another run_dir"
        )
    saved, ranks = manifest["layout"], run.ranks
    if manifest["state_layout"] == "dp_reshardable":
        same_model_parallel = (saved["tp_size"], saved["pp_size"]) == (ranks.tp_size, ranks.pp_size)
        same_buckets = ranks.dp_size == saved["dp_size"] or manifest["buckets"] == _buckets(run)
        if not (same_model_parallel and same_buckets):
            raise CheckpointError(
                f"{where}: a dp_reshardable checkpoint of TP {saved['tp_size']} x PP {saved['pp_size']}; resume at that layout, "
                "or save with checkpoint.layout fully_reshardable"
            )


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's random states: torch's default generators and megatron-core's dropout tracker."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.clone() for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


def sync_parameters(model: list[Any]) -> None:
    """Waits for gathers that overlap_param_gather left for the next forward pass."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random states back after a block, so that what ran inside leaves the training that goes on untouched."""
    states = rng_state()
    try:
        yield
    finally:
        set_rng_state(states)
