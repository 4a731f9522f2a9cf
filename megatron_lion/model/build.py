"""Builds this rank's part of the network, wrapped for training, and the objective that it minimises."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_lion.config import RunConfig, padded_vocab_size
from megatron_lion.device import Device
from megatron_lion.model.bert import MaskedAndOrder, build_bert
from megatron_lion.model.gpt import NextToken, build_gpt
from megatron_lion.model.initialize import initialize_weights
from megatron_lion.model.kernel_choice import choose_elementwise, choose_loss
from megatron_lion.model.mcore_settings import build_transformer_config, choose_attention
from megatron_lion.model.objective import Objective
from megatron_lion.model.weight_gradients import choose_fusion, install, keep_tied_output_apart


def build_model(config: RunConfig, device: Device, vocab_size: int) -> list[DistributedDataParallel]:
    """Builds, initialises and wraps this rank's part of the network.

    Args:
        config: the run's settings.
        device: device of parameters and buffers.
        vocab_size: number of token ids before padding.

    Returns:
        Model chunks (one: no interleaved schedule) wrapped in megatron-core's DDP with contiguous gradient
        buffers, fp32 unless `train.accumulate_allreduce_grads_in_fp32` is off.
    """
    fuses_gradients = choose_fusion(config.train.gradient_accumulation_fusion, config.train.precision, device)
    settings = build_transformer_config(config, device, fuses_gradients=fuses_gradients)
    if fuses_gradients:
        install()
    build = {"gpt2": build_gpt, "bert": build_bert}[config.model.kind]
    attention, loss = choose_attention(config.model.attention, device), choose_loss(config.model.loss, device)
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
    elementwise = choose_elementwise(config.model.elementwise, device, attention)
    network: torch.nn.Module = build(config.model, settings, attention, elementwise, loss, rows)
    keep_tied_output_apart(network)
    initialize_weights(network, seed=config.seed, std=config.model.init_method_std, num_layers=config.model.num_layers)
    if device.kind == "cuda":
        network.cuda(device.index)
    if config.train.precision != "fp32":
        network = Float16Module(settings, network)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.train.accumulate_allreduce_grads_in_fp32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # the optimizer's gate skips the step and names the parameter
    )
    wrapped = DistributedDataParallel(config=settings, ddp_config=ddp_config, module=network)
    if config.parallel.overlap_grad_reduce:
        # Otherwise the wrapper counts micro-batches to know when to reduce, and a probe has another number than a step.
        settings.no_sync_func = wrapped.no_sync
    return [wrapped]


def build_objective(kind: str) -> Objective:
    """Returns the objective of a kind of model, "gpt2" or "bert"."""
    return MaskedAndOrder() if kind == "bert" else NextToken()
