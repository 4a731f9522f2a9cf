"""BERT on megatron-core: masked language model and sentence order, exactly normalised over the global batch.

The network is megatron-core's BertModel: learned positions and token types, pre-LN layers with a final norm, a
masked-LM head tied to the token embeddings, a pooler and a 2-way head. The loss of a global batch of N samples
with M masked tokens is

    L = (1/M) Σ_masked -log p(token)  +  (1/N) Σ_samples -log p(order)

M is random and known only after the whole global batch was read, and megatron-core divides the summed gradient by one
count. That count is N, and the masked-LM sum is multiplied by N/M. M is counted before the first micro-batch runs: all
micro-batches of the step are read ahead, and their counts are summed over the data-parallel ranks. The gradient is then
that of L at every data-parallel size and number of micro-batches.

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
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_lion.config import ModelConfig
from megatron_lion.model.attention import SDPA_CORES
from megatron_lion.model.fused_loss import WithFusedLoss
from megatron_lion.model.mcore_settings import GELUS
from megatron_lion.model.objective import Batch, Objective, mean
from megatron_lion.parallel import all_reduce_sum

NUM_TOKEN_TYPES = 2


def bert_layer_spec(attention: str, elementwise: str = "megatron") -> ModuleSpec:
    """Returns the layer spec as `gpt_layer_spec` does, with bidirectional (padding) attention."""
    if attention == "transformer_engine":
        return get_bert_layer_with_transformer_engine_spec()
    spec = copy.deepcopy(bert_layer_local_spec)  # a module-level object of megatron-core, shared by all its users
    if attention in SDPA_CORES:
        spec.submodules.self_attention.submodules.core_attention = SDPA_CORES[attention]
    if elementwise == "fused":
        from megatron_lion.model.fused_layer import with_fused_elementwise  # not above: it needs Triton's kernels

        return with_fused_elementwise(spec)
    return spec


class Bert(BertModel):
    """megatron-core's BertModel with a masked-LM head for the masked positions only; it also returns its hits.

    At 15 % masking the output matrix, the largest of the model, is multiplied with a seventh of the vectors. The other
    positions are not part of the loss.
    """

    # mcore 0.19.2: the model asks this private method for the shape of its mask; remove when the mask is an argument.
    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        """Returns "b11s" for torch's attention: padding is masked as key only, so every query has keys (no NaN)."""
        core = self.transformer_layer_spec.submodules.self_attention.submodules.core_attention
        if core in SDPA_CORES.values():
            return "b11s"
        return str(super()._sanity_check_attention_and_get_attn_mask_dimension())

    def forward(
        self,
        tokens_BS: torch.Tensor,
        padding_mask_BS: torch.Tensor,
        types_BS: torch.Tensor,
        positions_BM: torch.Tensor | None = None,
        labels_BM: torch.Tensor | None = None,
    ) -> Any:
        """Runs this pipeline stage.

        Args:
            tokens_BS, types_BS: ids and segments (0, 1), int64.
            padding_mask_BS: 1 for a token, 0 for padding, int64.
            positions_BM: the M positions of each sample for the masked-LM head, int64; None means all S.
            labels_BM: true tokens at these positions, int64.

        Returns:
            On the last stage with labels: (losses and hits [2, B, M], order logits [B, 2]); without: (this
            tensor-parallel rank's logits [B, M, V/tp], order logits). On other stages the hidden states.
        """
        hidden_SBH = None
        if self.pre_process:
            hidden_SBH = self.embedding(
                input_ids=tokens_BS, position_ids=self.bert_position_ids(tokens_BS), tokentype_ids=types_BS
            )
        hidden_SBH = self.encoder(
            hidden_states=hidden_SBH, attention_mask=self.bert_extended_attention_mask(padding_mask_BS)
        )
        if not self.post_process:
            return hidden_SBH
        order_logits_B2 = self.binary_head(self.pooler(hidden_SBH, 0))
        chosen_MBH = hidden_SBH if positions_BM is None else self._choose(hidden_SBH, positions_BM)
        weight = self.shared_embedding_or_output_weight()
        logits_MBV, _ = self.output_layer(self.lm_head(hidden_states=chosen_MBH), weight=weight)
        asked = len(logits_MBV) if positions_BM is None else positions_BM.shape[1]  # without the padding of `_choose`
        if labels_BM is None:
            return logits_MBV[:asked].transpose(0, 1).contiguous(), order_logits_B2
        # Not the logits are cut, but their losses: the backward pass of a slice allocates and fills a whole gradient.
        labels_BM = F.pad(labels_BM, (0, len(logits_MBV) - asked))
        hits_BM = (likeliest_tokens(logits_MBV).transpose(0, 1) == labels_BM).float()
        # After the hits: megatron-core's loss overwrites fp32 logits.
        losses_BM = self.compute_language_model_loss(labels_BM, logits_MBV)
        return torch.stack([losses_BM.float(), hits_BM])[..., :asked], order_logits_B2

    def _choose(self, hidden_SBH: torch.Tensor, positions_BM: torch.Tensor) -> torch.Tensor:
        """Returns hidden states at the given positions, [M, B, H]; with sequence parallelism this rank's part, M rounded up."""
        split = self.config.sequence_parallel
        if split:
            # Each rank holds S/tp positions, and a masked one may be on any rank. Backward, the scatter below has gathered
            # the whole gradient on every rank, so this gather must split it instead of summing it.
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            positions_BM = F.pad(positions_BM, (0, -positions_BM.shape[1] % ranks))  # equal parts for the scatter
        index_MBH = positions_BM.transpose(0, 1).unsqueeze(-1).expand(-1, -1, hidden_SBH.shape[-1])
        chosen_MBH = hidden_SBH.gather(0, index_MBH)
        return scatter_to_sequence_parallel_region(chosen_MBH) if split else chosen_MBH


@torch.no_grad()
def likeliest_tokens(logits_MBV: torch.Tensor) -> torch.Tensor:
    """Returns the token ids [M, B] of the largest logits over the vocabulary, which is split over tensor-parallel ranks."""
    # In the logits' dtype: as float32 they have the same order and the same ties, of which the first counts.
    best_MB, ids_MB = logits_MBV.max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return ids_MB
    rows = logits_MBV.shape[-1]
    best_MB = best_MB.float()
    overall_MB = best_MB.clone()
    torch.distributed.all_reduce(overall_MB, op=torch.distributed.ReduceOp.MAX, group=group)
    # Ranks without the maximum offer an id beyond the vocabulary; of equal logits the lowest id wins, as on one rank.
    ids_MB = torch.where(best_MB == overall_MB, ids_MB + group.rank() * rows, group.size() * rows)
    torch.distributed.all_reduce(ids_MB, op=torch.distributed.ReduceOp.MIN, group=group)
    return ids_MB


class FusedBert(WithFusedLoss, Bert):
    """`Bert` with the fused loss."""


def build_bert(
    model: ModelConfig, settings: TransformerConfig, attention: str, elementwise: str, loss: str, rows: int
) -> Bert:
    """Builds this pipeline stage of BERT.

    Args:
        model: the network's settings.
        settings: from `build_transformer_config`.
        attention: attention core, from `choose_attention`.
        elementwise: from `choose_elementwise`.
        loss: from `choose_loss`.
        rows: rows of the embedding, padding included.
    """
    network = (FusedBert if loss == "fused" else Bert)(
        config=settings,
        num_tokentypes=NUM_TOKEN_TYPES,
        transformer_layer_spec=bert_layer_spec(attention, elementwise),
        vocab_size=rows,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        add_binary_head=True,
    )
    if network.post_process:
        network.lm_head.gelu = GELUS[model.gelu]  # one GELU in the whole network, as Hugging Face's MegatronBert has
    return network


class MaskedAndOrder(Objective):
    """Mean loss of all masked tokens of the global batch plus mean sentence-order loss of all its samples."""

    sum_names = (
        "loss_sum", "num_tokens", "num_masked", "num_samples", "mlm_loss_sum", "mlm_correct", "sop_loss_sum", "sop_correct",
    )  # fmt: skip
    # Also the masked tokens: without one, L has no first term. Samples always have one unless their masks are damaged.
    count_names = ("num_masked", "num_samples")

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Runs one micro-batch.

        Args:
            batches: yields the fields of `BertDataset` on the device, with a first dimension B; for a backward pass also
                mlm_weight (float64 scalar, N/M).
            model: one chunk.
        """
        batch = next(batches)
        output = model(batch["tokens"], batch["padding_mask"], batch["types"], batch["positions"], batch["labels"])
        return output, functools.partial(loss_sums, batch)

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        masked, samples = sums["num_masked"], sums["num_samples"]
        mlm_loss, sop_loss = mean(sums["mlm_loss_sum"], masked), mean(sums["sop_loss_sum"], samples)
        return {
            "loss": mlm_loss + sop_loss,
            "mlm_loss": mlm_loss,
            "sop_loss": sop_loss,
            "mlm_accuracy": mean(sums["mlm_correct"], masked),
            "sop_accuracy": mean(sums["sop_correct"], samples),
        }

    def usual_count(self, samples: int, seq_length: int) -> int:
        return samples

    def weigh_steps(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """Reads all micro-batches of a step ahead and adds the step's N/M to each."""
        while step := list(islice(batches, num_microbatches)):
            yield from self.weighed(iter(step), self.weight(iter(step)))

    def weight(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """Returns N/M over the given micro-batches of all data-parallel ranks (float64 scalar); a collective call."""
        totals: torch.Tensor | None = None
        for batch in batches:
            # Integers: their sum is exact and does not depend on the layout.
            counts = torch.stack([batch["loss_mask"].sum(), (batch["is_random"] >= 0).sum()])
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
    """Returns the sums of one micro-batch.

    Args:
        batch: the micro-batch of `forward_step`. Without mlm_weight (no backward pass) the loss sum is not weighted, and
            only the separate sums are meaningful.
        output: losses and hits [2, B, M], order logits [B, 2].

    Returns:
        N/M Σ masked-LM losses + Σ order losses (nats, scalar with gradient), number of samples (int32 scalar), and
        detached sums for the log.
    """
    losses_2BM, order_logits_B2 = output
    mask_BM, order_B = batch["loss_mask"].float(), batch["is_random"]
    mlm, mlm_correct = (losses_2BM * mask_BM).sum(dim=(1, 2))
    sop = F.cross_entropy(order_logits_B2.float(), order_B, reduction="sum")
    total = mlm * batch["mlm_weight"].float() + sop if "mlm_weight" in batch else mlm + sop
    num_samples = (
        (order_B >= 0).sum().to(torch.int)
    )  # cross_entropy ignores -100, which marks samples that fill a batch
    sums = {
        "loss_sum": total,
        "num_tokens": num_samples,
        "mlm_loss_sum": mlm,
        "num_masked": mask_BM.sum(),
        "mlm_correct": mlm_correct,
        "sop_loss_sum": sop,
        "num_samples": num_samples,
        "sop_correct": (order_logits_B2.argmax(dim=-1) == order_B).sum(),
    }
    # Clones: the schedule divides the loss by the number of micro-batches in place. float64: they are summed
    # over many micro-batches and ranks.
    return total, num_samples, {name: value.detach().clone().double() for name, value in sums.items()}
