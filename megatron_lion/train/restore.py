"""Restores a run from a checkpoint and refuses it if the restored state does not have the saved fingerprint."""

from __future__ import annotations

import logging

import torch

from megatron_lion.errors import CheckpointError, NumericsError
from megatron_lion.parallel import agree, derive_seed, seed_everything
from megatron_lion.runs.checkpoint_manifest import GO_BACK_BY_HAND
from megatron_lion.runs.steps import Checkpoint
from megatron_lion.train import checkpoint as ckpt
from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint
from megatron_lion.train.model_state import check_model, load_model_tensors, load_weights, model_sharded_state
from megatron_lion.train.random_state import set_rng_state
from megatron_lion.train.run import Run, bucket_sizes

logger = logging.getLogger(__name__)


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Verifies a checkpoint and restores model, optimizer, counters and random states; a collective call.

    Args:
        run: from `build_run`; changed in place.
        checkpoint: from `open_checkpoint`; its layout may differ from the run's.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model, optimizer or data; no file was changed.
    """
    manifest = checkpoint.manifest
    with agree("checking the checkpoint"):
        check_model(run.config, run.corpora, checkpoint)
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
    # A CUDA generator's state has 16 bytes, a CPU generator's 5,056: neither can be set on the other kind of device.
    if rng is not None and ("cuda" in rng) == torch.cuda.is_available():
        set_rng_state(rng)
    else:
        # Another layout or kind of device has other dropout streams. New ones are seeded with the step, so that they do
        # not repeat the masks of the run's first steps.
        seed_everything(derive_seed(run.config.seed, f"resume at {run.step}"), run.ranks)
    # The digests cover the files only. The fingerprint covers what arrived in memory after resharding, element by element.
    try:
        _compare_fingerprints(run, checkpoint)
    except NumericsError as error:  # saved by a version that did not check it
        raise CheckpointError(
            f"{checkpoint.folder}: {error}, so it cannot be trained from; {GO_BACK_BY_HAND}"
        ) from error


def restore_weights(run: Run, checkpoint: Checkpoint) -> None:
    """Verifies a checkpoint and loads only the model's weights, at any layout; a collective call.

    Master weights and optimizer state do not change, so the run can be measured afterwards but not trained.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model or other data.
    """
    load_weights(run.config, run.corpora, run.model, checkpoint, run.ranks)
    run.step = int(checkpoint.manifest["step"])


def is_import(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds imported initial weights: step 0, without optimizer state."""
    return checkpoint.step == 0 and checkpoint.manifest.get("state_layout") is None


def why_no_state(run: Run, checkpoint: Checkpoint) -> str | None:
    """Returns why optimizer state and master weights cannot be loaded at this layout, or None if they can."""
    if checkpoint.manifest.get("state_layout") is None:
        return "it holds no optimizer state"
    try:
        _check_state(run, checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _check_state(run: Run, checkpoint: Checkpoint) -> None:
    manifest, where = checkpoint.manifest, checkpoint.folder
    if manifest.get("state_layout") is None:
        raise CheckpointError(f"{where}: holds no optimizer state, so no run can resume from it; {GO_BACK_BY_HAND}")
    if manifest["optimizer"] != run.optimizer.name:
        raise CheckpointError(
            f"{where}: was written by {manifest['optimizer']}, optimizer.name is {run.optimizer.name}; use another run_dir"
        )
    saved, ranks = manifest["layout"], run.ranks
    if manifest["state_layout"] == "dp_reshardable":
        same_model_parallel = (saved["tp_size"], saved["pp_size"]) == (ranks.tp_size, ranks.pp_size)
        same_buckets = ranks.dp_size == saved["dp_size"] or manifest["buckets"] == bucket_sizes(run)
        if not (same_model_parallel and same_buckets):
            raise CheckpointError(
                f"{where}: a dp_reshardable checkpoint of TP {saved['tp_size']} x PP {saved['pp_size']}; resume at that layout, "
                "or save with checkpoint.layout fully_reshardable"
            )
        # Its tensors are named after the dtypes of weights and gradients. Only a probe has other buffers than the run.
        key = "train.accumulate_allreduce_grads_in_fp32"
        saved_kind = (manifest.get("settings") or {}).get(key, True)  # earlier versions had fp32 buffers only
        if saved_kind != run.config.train.accumulate_allreduce_grads_in_fp32:
            raise CheckpointError(
                f"{where}: a dp_reshardable checkpoint of a run with {key} {str(saved_kind).lower()}; "
                "save with checkpoint.layout fully_reshardable"
            )


def _compare_fingerprints(run: Run, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the restored state differs from the saved one without having been rounded."""
    manifest, optimizer = checkpoint.manifest, run.optimizer
    form = manifest.get("state_form", optimizer.state_form())
    found, saved = state_fingerprint(run.model, optimizer), manifest["state_fingerprint"]
    if found == saved:
        # In half precision the model's own weights are loaded separately from the master weights, and the next step
        # reads them. They are comparable only if precision and form of the master weights are unchanged, because
        # another precision or form rounds them differently.
        if (manifest["precision"], form) == (run.config.train.precision, optimizer.state_form()):
            found, saved = weights_fingerprint(run.model), manifest["weights_fingerprint"]
            if found != saved:
                raise _not_what_was_saved(checkpoint, "weights have", found, saved)
        return
    same_shards = manifest["layout"] == ckpt.layout_facts(run.ranks) and manifest["buckets"] == bucket_sizes(run)
    if not optimizer.rounds_state_of(form, same_shards=same_shards):
        raise _not_what_was_saved(checkpoint, "state has", found, saved)
    logger.info("%s: its state is rounded to %s, from %s", checkpoint.folder, optimizer.state_form(), form)


def _not_what_was_saved(checkpoint: Checkpoint, what: str, found: str, saved: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: the restored {what} fingerprint {found[:12]}, but {saved[:12]} was saved; "
        "please report this, and resume from another step"
    )
