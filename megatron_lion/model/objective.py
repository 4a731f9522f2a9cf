"""What a model minimises, as the loop, the probe and the held-out measurements see it."""

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
    ranks megatron-core divides the gradients by the global count. `sums` are detached, so that every mean that is
    logged is a quotient of global sums, right at every layout; they hold `loss_sum` and `num_tokens` (the two above)
    and what `sum_names` lists.
    """

    sum_names: tuple[str, ...] = ("loss_sum", "num_tokens")

    @abstractmethod
    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """One micro-batch: the signature that megatron-core's schedules call."""

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Global sums to what is logged; `loss` (nats) is what training minimises."""
        return {"loss": sums["loss_sum"] / max(1.0, sums["num_tokens"])}

    def weigh_steps(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """Adds to the micro-batches of each step what the loss must know about the whole step; here nothing."""
        return batches

    def weight(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """Reads all micro-batches of one long accumulation for the same purpose; here there is nothing to read."""
        return None

    def weighed(self, batches: Iterator[Batch], weight: torch.Tensor | None) -> Iterator[Batch]:
        """Micro-batches with what `weight` found."""
        return batches
