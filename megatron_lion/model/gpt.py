"""GPT-2 through megatron-core, and the forward step that the schedules call.

mcore 0.19.2: GPTModel prints a deprecation notice (HybridModel is to follow); model building stays behind
`build_model`, so that only this file changes when it does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lion.config import RunConfig, padded_vocab_size
from megatron_lion.device import DTYPES, Device
from megatron_lion.errors import EnvironmentFault
from megatron_lion.model.attention import SdpaAttention
from megatron_lion.model.initialize import initialize_weights

gelu_tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def build_transformer_config(config: RunConfig, device: Device) -> TransformerConfig:
    """megatron-core's settings for a run.

    GELU is the tanh form everywhere (GPT-2's `gelu_new`): megatron-core's fused kernel computes that form when given
    F.gelu, its unfused path computes what it is given.
    """
    model, parallel = config.model, config.parallel
    fused = device.has_fused_kernels
    dtype = DTYPES[config.train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_method_std,
        perform_initialization=False,  # initialize_weights does it, equally at every layout
        activation_func=torch.nn.functional.gelu if fused else gelu_tanh,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.train.precision == "bf16",
        fp16=config.train.precision == "fp16",
        calculate_per_token_loss=True,  # gradients are sums; finalize divides by the global token count
        attention_softmax_in_fp32=True,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=device.kind == "cuda",
        use_cpu_initialization=device.kind == "cpu",
    )


def transformer_engine_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("transformer_engine") is not None


def choose_attention(wanted: str, device: Device) -> str:
    """Resolves model.attention "auto"; refuses what is not there.

    Raises:
        EnvironmentFault: Transformer Engine was asked for and is not installed, or there is no CUDA device.
    """
    usable = transformer_engine_installed() and device.kind == "cuda"
    if wanted == "transformer_engine" and not usable:
        raise EnvironmentFault("model.attention: transformer_engine needs Transformer Engine and a CUDA device; use auto or sdpa")
    if wanted == "auto":
        return "transformer_engine" if usable else "sdpa"
    return wanted


def gpt_layer_spec(attention: str) -> ModuleSpec:
    """The layer spec for an attention core."""
    if attention == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec()
    if attention == "sdpa":
        spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    return spec


def build_model(config: RunConfig, device: Device, vocab_size: int) -> list[DistributedDataParallel]:
    """Builds, initialises and wraps this rank's part of the network.

    Args:
        config: the run.
        device: where it lives.
        vocab_size: ids before padding.

    Returns:
        Model chunks (one: no interleaved schedule) wrapped in megatron-core's DDP with contiguous fp32 gradient
        buffers.
    """
    settings = build_transformer_config(config, device)
    network: torch.nn.Module = GPTModel(
        config=settings,
        transformer_layer_spec=gpt_layer_spec(choose_attention(config.model.attention, device)),
        vocab_size=padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by),
        max_sequence_length=config.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
    initialize_weights(
        network, seed=config.seed, std=config.model.init_method_std, num_layers=config.model.num_layers
    )
    if device.kind == "cuda":
        network.cuda(device.index)
    if config.train.precision != "fp32":
        network = Float16Module(settings, network)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # the optimizer's gate looks, skips and names the parameter
    )
    return [DistributedDataParallel(config=settings, ddp_config=ddp_config, module=network)]


def loss_sum(loss_mask_BS: torch.Tensor, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses that count and how many they are: what megatron-core divides by after the reduction.

    Returns:
        Loss sum (nats, scalar with gradient), token count (int32 scalar), and detached copies for the log: the
        schedule divides the first in place.
    """
    mask = loss_mask_BS.float()
    total = torch.sum(loss_BS.float() * mask)
    num_tokens = mask.sum().to(torch.int)
    return total, num_tokens, {"loss_sum": total.detach().clone().double(), "num_tokens": num_tokens.detach().clone()}


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch: the signature that megatron-core's schedules call.

    Args:
        batches: yields tokens, labels, position_ids (int64 [B, S]) and loss_mask (float [B, S]) on the device.
        model: one chunk.
    """
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, functools.partial(loss_sum, batch["loss_mask"])
