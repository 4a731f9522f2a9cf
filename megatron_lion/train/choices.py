"""Settles the settings that are auto and depend on the machine, once for a run; config.yaml stores what was chosen."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.data.manifest import known_vocab_size
from megatron_lion.device import Device
from megatron_lion.model.micro_batch import choose_micro_batch
from megatron_lion.model.weight_gradients import choose_fusion
from megatron_lion.optim.triton_check import why_no_triton
from megatron_lion.parallel import Ranks, agree, broadcast_object
from megatron_lion.runs.folder import kept_choices
from megatron_lion.streams import say

logger = logging.getLogger(__name__)


def settle(config: RunConfig, device: Device, ranks: Ranks, *, fresh: bool = False) -> RunConfig:
    """Replaces auto in `optimizer.master_weights`, `data.masking` and two settings of `train`; a collective call.

    The two are `train.micro_batch_size` and `train.gradient_accumulation_fusion`.

    A run that has begun keeps what its config.yaml has, so that it computes the same as before. Its micro-batch is chosen
    again only if it does not divide a process's share at this number of processes.

    Args:
        config: the checked settings.
        device, ranks: of this process.
        fresh: whether an old run in the folder is about to be moved aside.

    Returns:
        The settings without auto, equal on all ranks, checked again.

    Raises:
        ConfigError: the run's own choice does not fit the command's other settings.
    """
    # All ranks have the same command, so all or none take part in the collective.
    memory = _smallest_memory(device) if config.train.micro_batch_size == "auto" else None
    with agree("choosing the micro-batch"):
        if ranks.is_main:
            if not fresh:
                config = kept_choices(config, ranks.world_size)
            config = replace(config, optimizer=replace(config.optimizer, master_weights=config.master_weights))
            config = replace(config, data=config.resolved().data)
            wanted = config.train.gradient_accumulation_fusion
            fusion = choose_fusion(wanted, config.train.precision, device)
            config = replace(config, train=replace(config.train, gradient_accumulation_fusion=fusion))
            if config.train.micro_batch_size == "auto":
                vocab = config.model.vocab_size or known_vocab_size([Path(path) for path in config.data.path])
                size = choose_micro_batch(_with_known_loss(config, memory), ranks.world_size, memory, vocab)
                config = replace(config, train=replace(config.train, micro_batch_size=size))
                where = "a CPU" if memory is None else f"{memory / 2**30:.0f} GiB of device memory"
                message = f"train.micro_batch_size: {size}, chosen for {where}; config.yaml keeps it"
                logger.info("%s", message)
                say(message)
            check_config(config, ranks.world_size)
    chosen: RunConfig = broadcast_object(config if ranks.is_main else None)
    return chosen


def _with_known_loss(config: RunConfig, memory: int | None) -> RunConfig:
    """Returns the settings with the loss that auto falls back to if Triton cannot run here: it holds more memory."""
    if memory is None or config.model.loss != "auto" or why_no_triton() is None:
        return config
    return replace(config, model=replace(config.model, loss="megatron"))


def _smallest_memory(device: Device) -> int | None:
    """Returns the bytes of the smallest device of the job, or None on a CPU; a collective call."""
    if (found := device.memory_bytes()) is None:
        return None
    total = torch.tensor([found], device=device.torch_device)
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    return int(total)
