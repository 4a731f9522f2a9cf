"""Attention core on torch's scaled_dot_product_attention, for megatron-core's local layer spec.

megatron-core's own DotProductAttention stores the S x S probabilities and runs unfused. This one calls torch, which
uses a flash kernel if it can, on CPU and on GPU.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def reproducible_kernels(device: torch.device) -> list[SDPBackend] | None:
    """Returns the attention kernels whose backward pass has the same bits in every run, or None if all do.

    On CUDA the memory-efficient and the cuDNN kernel add their parts of dQ with atomics. The flash kernel does so too,
    unless torch.use_deterministic_algorithms is on. Flash supports no mask and no float32; then the plain kernel runs.
    """
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if device.type == "cuda" else None


CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Order of the kernels of `model.attention: cudnn`; torch takes the first one that supports the arguments and the device."""


class SdpaAttention(MegatronModule):
    """Drop-in for `core_attention` of a megatron-core layer spec.

    Shapes: S sequence, B batch, N heads of this tensor-parallel rank, D channels a head.

    Args:
        config: megatron-core's settings.
        layer_number: number of the layer in the whole model, from 1.
        attn_mask_type: causal for GPT-2, padding for BERT.
        attention_type: "self"; others are rejected.
        attention_dropout: default `config.attention_dropout`.
        softmax_scale: default 1 / sqrt(D).
        cp_comm_type, pg_collection: part of the layer spec's call, not used; context parallelism is not supported.

    Raises:
        ValueError: the settings need something that this core does not support.
    """

    kernels: list[SDPBackend] | None = None
    """The kernels in the order of preference; None leaves the choice to torch."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1 or attention_type != "self" or config.apply_query_key_layer_scaling:
            raise ValueError(
                "SdpaAttention supports only self-attention without context parallelism and without QK layer scaling; "
                "use another attention core"
            )
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Computes the attention core.

        Args:
            query, key, value: [S, B, N, D].
            attention_mask: for padding attention, bool [B, 1, 1 or S, S], True where attention is forbidden
                (megatron-core's convention; torch's is the opposite).

        Returns:
            [S, B, N * D].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaAttention takes neither an attention bias nor packed sequences")
        query_BNSD, key_BNSD, value_BNSD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type == AttnMaskType.causal
        allowed = None if causal or attention_mask is None else ~attention_mask
        dropout = self.dropout if self.training else 0.0

        kernels = reproducible_kernels(query.device) if self.config.deterministic_mode else self.kernels

        def attend() -> torch.Tensor:
            with nullcontext() if kernels is None else sdpa_kernel(kernels, set_priority=True):
                return F.scaled_dot_product_attention(
                    query_BNSD,
                    key_BNSD,
                    value_BNSD,
                    attn_mask=allowed,
                    dropout_p=dropout,
                    is_causal=causal,
                    scale=self.softmax_scale,
                )

        if dropout > 0.0 and not self.config.sequence_parallel:
            # Heads are split over the tensor-parallel group. Its ranks share the default stream of random numbers, so
            # each draws the dropout of its heads from its own tracked stream. Under sequence parallelism megatron-core's
            # TransformerBlock has already switched to it.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context_BNSD = attend()
        else:
            context_BNSD = attend()
        sequence, batch = query.shape[0], query.shape[1]
        return context_BNSD.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


class CudnnAttention(SdpaAttention):
    """SdpaAttention that prefers cuDNN's kernel, for `model.attention: cudnn`."""

    kernels = CUDNN_FIRST


SDPA_CORES = {"sdpa": SdpaAttention, "cudnn": CudnnAttention}
"""Attention cores on scaled_dot_product_attention, by `model.attention`."""
