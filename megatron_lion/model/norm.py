"""Layer norm for megatron-core's local layer spec, with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm, its parameters marked so that megatron-core sums their gradients over a split sequence.

    mcore 0.19.2: its wrapper around torch.nn.LayerNorm refuses sequence_parallel, which needs the mark and nothing
    else; remove when it sets the mark.

    Args:
        config: megatron-core's settings.
        hidden_size: channels.
        eps: added to the variance.
        unused: parts of the layer spec's call that choose among other norms.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
