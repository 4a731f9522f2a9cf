"""The scalars that a probe keeps of its batches: sums over all batches, and over all but one group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron_lion.gradient.part_sums import PartSums


@dataclass(frozen=True)
class Sums:
    """The gradient sum over some batches.

    Attributes:
        num_batches, count: number of batches, and the loss's count over them.
        l1, squares: ‖·‖₁ and ‖·‖₂² of the mean gradient (the sum divided by `count`).
        scatter: Σ ‖g_i‖₂²/c_i over the batches, for gradient sums g_i with counts c_i.
        aligned: mean over the groups j of ⟨sign(G − G_j), ḡ_j⟩, with the sum G of all groups and the mean gradient ḡ_j
            of one. Its expectation is at most ‖∇f‖₁ for noise of any distribution, because the signs do not depend on
            ḡ_j. Only in `BatchGroups.folds`; else NaN.
    """

    num_batches: int
    count: int
    l1: float
    squares: float
    scatter: float
    aligned: float


@dataclass(frozen=True)
class Prefix(Sums):
    """The sum over the first batches.

    Attributes:
        without: the same without each of the disjoint groups that make up these batches; empty for a single group.
        aligned_by_group: ⟨sign(G − G_j), ḡ_j⟩ of each group j, or empty.
    """

    without: tuple[Sums, ...]
    aligned_by_group: tuple[float, ...]

    @property
    def group_sizes(self) -> list[int]:
        """Number of batches of each group."""
        return [self.num_batches - part.num_batches for part in self.without]


@dataclass(frozen=True)
class BatchGroups:
    """What a probe keeps of its batches.

    Attributes:
        prefixes: by number of batches k: those rungs of the ladder that consist of whole kept groups, and all batches.
        ratios: by level: ‖·‖₁/‖·‖₂ of each disjoint group of 2^level batches.
        sketch_error: relative standard deviation that the sketch adds to a squared norm; 0 if it is exact.
        folds: all batches, in at most `MOST_FOLDS` groups.
        contrasts_J2: ‖·‖₁ and ‖·‖₂² of the sampled coordinates of J realizations of the noise; see `contrasts_of`.
        sample_error: relative standard deviation that the sample of coordinates adds to the lower bound on ‖∇f‖₁.
        parts: sums of each tensor; None in the sums of a part.
    """

    prefixes: dict[int, Prefix]
    ratios: dict[int, list[float]]
    sketch_error: float
    folds: Prefix
    contrasts_J2: torch.Tensor
    sample_error: float = 0.0
    parts: PartSums | None = None
