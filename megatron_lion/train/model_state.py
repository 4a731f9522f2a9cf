"""The model's weights as ShardedTensors, loading them, and the check that a checkpoint fits the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import Float16Module

from megatron_lion.config import RunConfig
from megatron_lion.data.corpora import Corpora
from megatron_lion.errors import CheckpointError, NumericsError
from megatron_lion.parallel import Ranks, agree
from megatron_lion.runs.checkpoint_manifest import GO_BACK_BY_HAND
from megatron_lion.runs.steps import Checkpoint
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.fingerprint import weights_fingerprint

logger = logging.getLogger(__name__)


def unwrap(chunk: Any) -> Any:
    """The megatron-core network inside DDP and the half-precision wrapper."""
    core = chunk.module
    return core.module if isinstance(core, Float16Module) else core


def model_sharded_state(model: list[Any], prefix: str = "model.") -> dict[str, Any]:
    """The model's parameters as megatron-core ShardedTensors whose data are the Parameter objects.

    Upstream's other entries (`_extra_state`) are left out: they would be stored as pickled objects.
    """
    items = {key: item for chunk in model for key, item in unwrap(chunk).sharded_state_dict(prefix=prefix).items()}
    return {key: item for key, item in items.items() if isinstance(item, ShardedTensor)}


def load_model_tensors(model: list[Any], tensors: dict[str, torch.Tensor]) -> None:
    """Copies loaded weights into the model's parameters.

    Args:
        model: DDP-wrapped chunks.
        tensors: this rank's parts by the keys of `model_sharded_state`; cast to the parameter's dtype.
    """
    with torch.no_grad():
        for key, target in model_sharded_state(model).items():
            target.data.copy_(tensors[key].view_as(target.data))


def model_facts(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Returns the settings that must be equal for a checkpoint to fit a model."""
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


def check_model(config: RunConfig, corpora: Corpora, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the checkpoint belongs to this model and this data."""
    manifest, where = checkpoint.manifest, checkpoint.folder
    ours = model_facts(config, corpora.vocab_size)
    different = [
        f"{key} {manifest['model'].get(key)} (now {value})"
        for key, value in ours.items()
        if manifest["model"].get(key) != value
    ]
    if different:
        raise CheckpointError(
            f"{where}: belongs to another model: {', '.join(different)}; use its settings or another run_dir"
        )
    if manifest["data_digest"] is None:  # imported weights: only the vocabulary must fit
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


def load_weights(config: RunConfig, corpora: Corpora, model: list[Any], checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Verifies a checkpoint and loads its weights into the model, at any layout; a collective call.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model or other data.
    """
    with agree("checking the checkpoint"):
        check_model(config, corpora, checkpoint)
    read_weights(model, checkpoint, ranks)


def read_weights(model: list[Any], checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Verifies a checkpoint, reads its weights into the model, and compares what arrived in memory; a collective call.

    The weights are read and compared in the dtype in which they were saved, and then cast to the model's.

    Args:
        model: DDP-wrapped chunks of the checkpoint's architecture, at any layout.
        checkpoint: from `open_checkpoint`.
        ranks: this process's ranks.

    Raises:
        CheckpointError: the checkpoint is damaged, or the weights that arrived have not the fingerprint of those saved.
    """
    saved_as = ckpt.verify_checkpoint(checkpoint, ranks)
    wanted, parameters, padded = {}, {}, False
    for key, item in model_sharded_state(model).items():
        parameters[key] = item.data  # now, since upstream clears it while it reads
        found_as = saved_as.get(item.key, ckpt.Stored(item.dtype, tuple(item.global_shape)))
        stored = found_as.dtype
        padded = padded or found_as.shape != tuple(item.global_shape)
        same = stored == item.dtype  # then upstream reads into the parameters, without a second copy
        wanted[key] = item if same else replace(item, data=torch.empty_like(item.data, dtype=stored), dtype=stored)
    loaded = ckpt.read_tensors({"model": wanted}, checkpoint.folder)["model"]
    if padded:
        # Upstream lets the rows of the vocabulary's padding differ, as an import may have more of them than this model,
        # and refuses other shapes. The fingerprint covers these rows too, so it is not comparable.
        logger.info("%s: padded to another size, so the weights' fingerprint is not compared", checkpoint.folder)
        load_model_tensors(model, loaded)
        return
    # The digests cover the files, and fit if a file was changed together with its digest; this covers what arrived.
    try:
        found = weights_fingerprint(model, {parameter: loaded[key] for key, parameter in parameters.items()})
    except NumericsError as error:  # saved by a version that did not check it
        raise CheckpointError(f"{checkpoint.folder}: {error}; {GO_BACK_BY_HAND}") from error
    saved = checkpoint.manifest["weights_fingerprint"]
    if found != saved:
        raise CheckpointError(
            f"{checkpoint.folder}: the weights that were read have fingerprint {found[:12]}, but {saved[:12]} was saved; {GO_BACK_BY_HAND}"
        )
    load_model_tensors(model, loaded)
