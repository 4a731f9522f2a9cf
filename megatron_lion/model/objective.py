"""Interface of a model's loss, used by the training loop, the probe and the held-out measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

Batch = dict[str, torch.Tensor]


class Objective(ABC):
    """A loss as sums over the samples of many micro-batches and ranks.

    The contract with megatron-core's schedules: `forward_step(batches, model)` returns (output, loss_func);
    `loss_func(output)` returns (loss sum, count, sums). Backward runs from the loss sum; after the reduction over all
    ranks megatron-core divides the gradients by the global count. `sums` holds detached scalars: `loss_sum` and
    `num_tokens` (the two above) and the others of `sum_names`. Every logged mean is a quotient of global sums, so it is
    right at every layout.
    """

    sum_names: tuple[str, ...] = ("loss_sum", "num_tokens")

    @abstractmethod
    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Runs one micro-batch; megatron-core's schedules call it with this signature."""

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns the means to log, from global sums; `loss` (nats) is the one that training minimises."""
        return {"loss": sums["loss_sum"] / max(1.0, sums["num_tokens"])}

    def weigh_steps(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """Adds the value that the loss needs of a whole step to its micro-batches; nothing by default."""
        return batches

    def weight(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """Computes the same value over all micro-batches of one accumulation; None by default, without reading them."""
        return None

    def weighed(self, batches: Iterator[Batch], weight: torch.Tensor | None) -> Iterator[Batch]:
        """Returns the micro-batches with the value that `weight` returned; unchanged by default."""
        return batches
