"""Cautious LION: counts the elements whose update agrees with the gradient, and derives the step factor φ.

    φ = 1 / max(mean(s(c)·g > 0), 1e-3)      over the whole parameter, all its shards
    u = s(c) · (φ where s(c)·g > 0, else 0) + λθ

Source: Liang et al., *Cautious Optimizers: Improving Training with One Line of Code*, 2024, algorithm 2. The count is an
integer, so φ does not depend on how a parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .update import PlainLayout, Slot

SMALLEST_MEAN = 1e-3

SumAgreement = Callable[[Sequence[torch.Tensor], torch.Tensor], None]


def factors(
    params: Sequence[torch.Tensor], counts: torch.Tensor, numels: torch.Tensor, sum_agreement: SumAgreement | None
) -> torch.Tensor:
    """Returns φ of every parameter.

    Args:
        params: the parameters, or this rank's shards of them.
        counts: int64 [P], elements of each whose update has the sign of the gradient.
        numels: int64 [P], elements of each.
        sum_agreement: called with `params` and int64 [P, 2] of (counts, numels). It replaces each pair, in place, by
            the sum over all ranks that hold a part of the parameter. None: every parameter is whole.

    Returns:
        float32 [P].
    """
    agreement = torch.stack([counts, numels], dim=1)
    if sum_agreement is not None:
        sum_agreement(params, agreement)
    # float64 holds every count below 2^53 exactly, so φ is rounded only by the division and by the last cast.
    mean = agreement[:, 0].to(torch.float64) / agreement[:, 1]
    return (1 / mean.clamp(min=SMALLEST_MEAN)).to(torch.float32)


def with_caution(slots: Sequence[Slot], counts: torch.Tensor, sum_agreement: SumAgreement | None) -> list[Slot]:
    """Returns the slots with their φ.

    Args:
        slots: parameters, or this rank's shards of them.
        counts: int64 [P], from `count_agreement`.
        sum_agreement: as for `factors`.
    """
    if not slots:
        return []
    numels = torch.tensor([slot.param.numel() for slot in slots], device=counts.device)
    phi = factors([slot.param for slot in slots], counts, numels, sum_agreement)
    return [slot._replace(caution=value) for slot, value in zip(slots, phi.unbind(), strict=True)]


def count_agreement(
    slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None
) -> torch.Tensor:
    """Counts the elements of each slot whose update has the sign of the gradient, in torch operations; int64 [P].

    The arguments are those of `megatron_lion.optim.update.reference_step`.
    """
    counts = []
    for slot in slots:
        _, exp_avg_N = layout.read(slot)
        grad_N = slot.grad.to(exp_avg_N.dtype)
        for factor in () if multiplier is None else multiplier.view(-1):
            grad_N = grad_N * factor
        if slot.group.get("maximize"):
            grad_N = -grad_N
        if begin:
            exp_avg_N = torch.where(exp_avg_N.isnan(), grad_N, exp_avg_N)
        beta1 = slot.group["betas"][0]
        interpolation_N = exp_avg_N * beta1 + grad_N * (1 - beta1)
        # sign(±inf) is ±1, but `lion_update` turns such an element into NaN, so it must not count.
        finite_N = interpolation_N.isfinite()
        counts.append((finite_N & (interpolation_N.sign() * grad_N > 0)).sum())
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)
