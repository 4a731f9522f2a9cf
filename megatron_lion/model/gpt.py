"""GPT-2 on megatron-core, and its next-token loss.

mcore 0.19.2: GPTModel prints a deprecation notice (HybridModel is to follow). No other file builds it, so its replacement
changes this file only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lion.config import ModelConfig
from megatron_lion.model.attention import SDPA_CORES
from megatron_lion.model.chunked_loss import ChunkedGpt
from megatron_lion.model.fused_loss import WithFusedLoss
from megatron_lion.model.objective import Batch, Objective


def gpt_layer_spec(attention: str, elementwise: str = "megatron") -> ModuleSpec:
    """Returns the layer spec for an attention core, and for "megatron" or "fused" element-wise operations."""
    if attention == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec()
    if attention in SDPA_CORES:
        spec.submodules.self_attention.submodules.core_attention = SDPA_CORES[attention]
    if elementwise == "fused":
        from megatron_lion.model.fused_layer import with_fused_elementwise  # not above: it needs Triton's kernels

        return with_fused_elementwise(spec)
    return spec


class FusedGpt(WithFusedLoss, GPTModel):
    """megatron-core's GPTModel with the fused loss."""


def build_gpt(
    model: ModelConfig, settings: TransformerConfig, attention: str, elementwise: str, loss: str, rows: int
) -> GPTModel:
    """Builds this pipeline stage of GPT-2.

    Args:
        model: the network's settings.
        settings: from `build_transformer_config`.
        attention: attention core, from `choose_attention`.
        elementwise: from `choose_elementwise`.
        loss: from `choose_loss`.
        rows: rows of the embedding, padding included.
    """
    return {"megatron": GPTModel, "fused": FusedGpt, "chunked": ChunkedGpt}[loss](
        config=settings,
        transformer_layer_spec=gpt_layer_spec(attention, elementwise),
        vocab_size=rows,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )


class NextToken(Objective):
    """Mean negative log-likelihood of the next token, over all tokens of the global batch."""

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Runs one micro-batch.

        Args:
            batches: yields tokens, labels, position_ids (int64 [B, S]) and loss_mask (float [B, S]) on the device.
            model: one chunk.
        """
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, functools.partial(loss_sum, batch["loss_mask"])

    def usual_count(self, samples: int, seq_length: int) -> int:
        return samples * seq_length


def loss_sum(
    loss_mask_BS: torch.Tensor, loss_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the sum of the unmasked token losses and their count, by which megatron-core divides after the reduction.

    Args:
        loss_mask_BS: 1 for a token that counts, else 0.
        loss_BS: loss of each token, nats.

    Returns:
        Loss sum (nats, scalar with gradient), token count (int32 scalar), and detached copies for the log, because the
        schedule divides the loss sum in place.
    """
    mask = loss_mask_BS.float()
    total = torch.sum(loss_BS.float() * mask)
    num_tokens = mask.sum().to(torch.int)
    return (
        total,
        num_tokens,
        {
            "loss_sum": total.detach().clone().double(),
            "num_tokens": num_tokens.detach().clone(),
        },
    )
