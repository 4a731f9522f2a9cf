"""BERT through megatron-core: masked language model and sentence order, exactly normalised over the global batch.

The network is megatron-core's BertModel: learned positions and token types, pre-LN layers with a final norm, a
masked-LM head tied to the token embeddings, a pooler and a 2-way head. The loss of a global batch of N samples
with M masked tokens is

    L = (1/M) Σ_masked -log p(token)  +  (1/N) Σ_samples -log p(order)

M is a random number, known only when the whole global batch has been read, and megatron-core divides the summed
gradient by one count. So that count is N, the masked-LM sum is multiplied by N/M, and M is found by looking ahead over
the micro-batches of the step and summing over the data-parallel ranks before the first of them runs. The gradient
is then that of L at every data-parallel size and number of micro-batches.

Source: Devlin et al. 2018 (masked LM), Shoeybi et al. 2019 (pre-LN BERT), Lan et al. 2019 (sentence order).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    get_bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_lion.config import ModelConfig
from megatron_lion.model.attention import SdpaAttention
from megatron_lion.model.objective import Batch, Objective
from megatron_lion.model.settings import gelu_tanh
from megatron_lion.parallel import all_reduce_sum

NUM_TOKEN_TYPES = 2


def bert_layer_spec(attention: str) -> ModuleSpec:
    """The layer spec for an attention core, with bidirectional (padding) attention."""
    if attention == "transformer_engine":
        return get_bert_layer_with_transformer_engine_spec()
    spec = copy.deepcopy(bert_layer_local_spec)
    if attention == "sdpa":
        spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    return spec


class Bert(BertModel):
    """megatron-core's BertModel whose loss says, for every position, whether the likeliest token is the label too."""

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        """The mask is [B, 1, 1, S] for torch's attention: padding is no key, and no query is left without keys."""
        core = self.transformer_layer_spec.submodules.self_attention.submodules.core_attention
        if core is SdpaAttention:
            return "b11s"
        return str(super()._sanity_check_attention_and_get_attn_mask_dimension())

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Losses [0] (with gradient) and hits [1] (0 or 1), stacked: [2, B, S].

        Args:
            labels: token ids [B, S].
            logits: of this tensor-parallel rank's part of the vocabulary [S, B, V/tp]; overwritten by the loss.
        """
        hits_BS = (likeliest_tokens(logits).transpose(0, 1) == labels).float()
        return torch.stack([super().compute_language_model_loss(labels, logits).float(), hits_BS])


@torch.no_grad()
def likeliest_tokens(logits_SBV: torch.Tensor) -> torch.Tensor:
    """Token ids [S, B] of the largest logits over the whole vocabulary, of which each tensor-parallel rank has a part."""
    best_SB, ids_SB = logits_SBV.float().max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return ids_SB
    rows = logits_SBV.shape[-1]
    overall_SB = best_SB.clone()
    torch.distributed.all_reduce(overall_SB, op=torch.distributed.ReduceOp.MAX, group=group)
    ids_SB = torch.where(best_SB == overall_SB, ids_SB + group.rank() * rows, group.size() * rows)
    torch.distributed.all_reduce(ids_SB, op=torch.distributed.ReduceOp.MIN, group=group)
    return ids_SB


def build_bert(model: ModelConfig, settings: TransformerConfig, attention: str, rows: int) -> Bert:
    """This pipeline stage of BERT.

    Args:
        model: shape.
        settings: from `build_transformer_config`.
        attention: resolved attention core.
        rows: of the embedding, padding included.
    """
    network = Bert(
        config=settings,
        num_tokentypes=NUM_TOKEN_TYPES,
        transformer_layer_spec=bert_layer_spec(attention),
        vocab_size=rows,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        add_binary_head=True,
    )
    if network.post_process:
        network.lm_head.gelu = gelu_tanh  # one GELU in the whole network, as Hugging Face's MegatronBert has
    return network


class MaskedAndOrder(Objective):
    """Masked LM over all masked tokens of the global batch plus sentence order over all its samples."""

    sum_names = (
        "loss_sum", "num_tokens", "mlm_loss_sum", "num_masked", "mlm_correct", "sop_loss_sum", "num_samples", "sop_correct",
    )  # fmt: skip

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """One micro-batch.

        Args:
            batches: yields on the device tokens, types, labels, padding_mask (1 where there is a token), loss_mask (1
                where one is masked), all int64 [B, S]; is_random, 1 where the segments are swapped, int64 [B]; and
                for a backward pass mlm_weight (float scalar, N/M).
            model: one chunk.
        """
        batch = next(batches)
        output = model(batch["tokens"], batch["padding_mask"], tokentype_ids=batch["types"], lm_labels=batch["labels"])
        return output, functools.partial(loss_sums, batch)

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        masked, samples = max(1.0, sums["num_masked"]), max(1.0, sums["num_samples"])
        mlm_loss, sop_loss = sums["mlm_loss_sum"] / masked, sums["sop_loss_sum"] / samples
        return {
            "loss": mlm_loss + sop_loss,
            "mlm_loss": mlm_loss,
            "sop_loss": sop_loss,
            "mlm_accuracy": sums["mlm_correct"] / masked,
            "sop_accuracy": sums["sop_correct"] / samples,
        }

    def weigh_steps(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """Reads the micro-batches of one step ahead and gives each the step's N/M."""
        while step := list(islice(batches, num_microbatches)):
            yield from self.weighed(iter(step), self.weight(iter(step)))

    def weight(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """N/M over all given micro-batches and all data-parallel ranks (float64 scalar); a collective call."""
        totals: torch.Tensor | None = None
        for batch in batches:
            counts = torch.stack([batch["loss_mask"].sum(), batch["is_random"].new_tensor(batch["is_random"].numel())])
            totals = counts if totals is None else totals + counts
        if totals is None:
            return None
        totals = all_reduce_sum(totals, parallel_state.get_data_parallel_group())
        return totals[1].double() / totals[0].clamp(min=1)

    def weighed(self, batches: Iterator[Batch], weight: torch.Tensor | None) -> Iterator[Batch]:
        for batch in batches:
            yield batch if weight is None else {**batch, "mlm_weight": weight}


def loss_sums(
    batch: Batch, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sums of one micro-batch.

    Args:
        batch: as `forward_step` got it. Without mlm_weight (nothing is differentiated) the loss sum is not
            weighted, and only the separate sums are of use.
        output: losses and hits [2, B, S], order logits [B, 2].

    Returns:
        N/M Σ masked-LM losses + Σ order losses (nats, scalar with gradient), number of samples (int32 scalar), and
        detached sums for the log.
    """
    losses_2BS, order_logits_B2 = output
    mask_BS, order_B = batch["loss_mask"].float(), batch["is_random"]
    mlm, mlm_correct = (losses_2BS * mask_BS).sum(dim=(1, 2))
    sop = F.cross_entropy(order_logits_B2.float(), order_B, reduction="sum")
    total = mlm * batch["mlm_weight"].float() + sop if "mlm_weight" in batch else mlm + sop
    num_samples = torch.tensor(order_B.numel(), dtype=torch.int, device=total.device)
    sums = {
        "loss_sum": total,
        "num_tokens": num_samples,
        "mlm_loss_sum": mlm,
        "num_masked": mask_BS.sum(),
        "mlm_correct": mlm_correct,
        "sop_loss_sum": sop,
        "num_samples": num_samples,
        "sop_correct": (order_logits_B2.argmax(dim=-1) == order_B).sum(),
    }
    return total, num_samples, {name: value.detach().clone().double() for name, value in sums.items()}
