"""Interface of a model's loss, used by the training loop, the probe and the held-out measurements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_lion.errors import DataError

Batch = dict[str, torch.Tensor]


class Objective(ABC):
    """A loss as sums over the samples of many micro-batches and ranks.

    The contract with megatron-core's schedules: `forward_step(batches, model)` returns (output, loss_func);
    `loss_func(output)` returns (loss sum, count, sums). Backward runs from the loss sum; after the reduction over all
    ranks megatron-core divides the gradients by the global count. `sums` holds detached scalars: `loss_sum` and
    `num_tokens` (the two above) and the others of `sum_names`. Every logged mean is a quotient of global sums, so it is
    right at every layout.

    Attributes:
        sum_names: the scalars to sum.
        count_names: those of them that a mean divides by. If one is 0 the loss is undefined, and the gradient that
            megatron-core returns (it divides by at least 1) is not that of the loss: such a step must not be taken.
            They are neighbours in `sum_names`.
    """

    sum_names: tuple[str, ...] = ("loss_sum", "num_tokens")
    count_names: tuple[str, ...] = ("num_tokens",)

    @abstractmethod
    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Runs one micro-batch; megatron-core's schedules call it with this signature."""

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns the means to log, from global sums; `loss` (nats) is the one that training minimises.

        A mean over nothing is NaN.
        """
        return {"loss": mean(sums["loss_sum"], sums["num_tokens"])}

    @abstractmethod
    def usual_count(self, samples: int, seq_length: int) -> int:
        """Returns what `loss_func` counts in that many full samples; the first loss scale of fp16 follows from it."""

    def uncounted(self, sums: Mapping[str, float]) -> str | None:
        """Returns the first of `count_names` that is 0, or None if all are above 0."""
        return next((name for name in self.count_names if not sums[name] > 0), None)

    def count_places(self) -> slice:
        """Returns the places of `count_names` in `sum_names`."""
        first = self.sum_names.index(self.count_names[0])
        places = slice(first, first + len(self.count_names))
        assert self.sum_names[places] == self.count_names
        return places

    def require_counts(self, sums: Mapping[str, float], what: str) -> None:
        """Raises an error if there was nothing to measure; all ranks have the same sums and raise alike.

        Args:
            sums: global sums.
            what: what was measured, for the message.

        Raises:
            DataError: a count is 0.
        """
        if (name := self.uncounted(sums)) is not None:
            error = DataError(
                f"{what}: the loss counts nothing ({name} is 0), so its mean is undefined; check the data and its index "
                "cache (data.cache, or the run's folder cache)"
            )
            error.told_by = 0
            raise error

    def weigh_steps(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """Adds the value that the loss needs of a whole step to its micro-batches; nothing by default."""
        return batches

    def weight(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """Computes the same value over all micro-batches of one accumulation; None by default, without reading them."""
        return None

    def weighed(self, batches: Iterator[Batch], weight: torch.Tensor | None) -> Iterator[Batch]:
        """Returns the micro-batches with the value that `weight` returned; unchanged by default."""
        return batches


def mean(total: float, count: float) -> float:
    """Returns total / count, or NaN if nothing was counted."""
    return total / count if count > 0 else math.nan
