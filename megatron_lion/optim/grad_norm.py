"""The gradient's norm and the scalars of a step, on the device: two launches in Triton, and the same in torch.

Between the reduced gradient and the update stand the ℓ2 norm over all ranks, the clip coefficient, the division by the
loss's global count, and the decision to skip the step. None of them is read on the host. In torch they are about
twenty launches; `TritonNorm` takes two, around the one collective that adds the ranks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .kernel_launch import TYPES, chunk_table, upload
from .triton_check import triton_kernel, why_no_triton

BLOCK = 4096  # 16 elements a thread, in four accesses of 16 bytes: enough bytes are in flight with few programs an SM
NUM_WARPS = 8
PROGRAMS = 1024  # 8 on each of an H100's 132 SMs; a power of two
PROGRAMS_INTERPRETED = 8  # Triton's interpreter runs one after the other


@dataclass(frozen=True)
class StepScalars:
    """What an update reads of the whole gradient; tensors on the device.

    Attributes:
        norm: ℓ2 norm of the mean gradient over all ranks, before clipping, float64 [].
        multipliers: factors of every gradient, float32 [0 to 2]: 1 / count and the clip coefficient.
        found_inf: not 0 if the step must be skipped, float32 [].
    """

    norm: torch.Tensor
    multipliers: torch.Tensor | None
    found_inf: torch.Tensor


def replicas_of(optimizer: Any, counted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradients of this rank that upstream's norm leaves out, because another rank counts a copy.

    Biases and norms are whole on every tensor-parallel rank, and a tied embedding is on two pipeline stages. Upstream's
    norm counts one copy of each.

    Args:
        optimizer: megatron-core's wrapper.
        counted: the gradients that its norm counts.
    """
    known = {id(grad) for grad in counted}
    name = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer else "grad"
    own = (getattr(parameter, name, None) for parameter in optimizer.get_parameters())
    return [grad for grad in own if grad is not None and id(grad) not in known]


def with_replicas(counted: list[torch.Tensor], replicas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradients for the norm and 0 · ‖replicas‖, which is zero, or NaN if a replica is not finite.

    So the norm is the gate for replicas too.
    """
    return [*counted, (torch.stack(torch._foreach_norm(list(replicas))) * 0.0).sum()] if replicas else counted


def let_replicas_reach_the_norm(optimizer: Any) -> None:
    """Makes the gradient norm NaN if a replica that the norm does not count is not finite, so that the gate sees it."""
    counted = optimizer.get_grads_for_grad_norm

    def grads(grad_norm_group: str | None = None) -> list[torch.Tensor]:
        found = counted(grad_norm_group)
        return with_replicas(found, replicas_of(optimizer, found))

    optimizer.get_grads_for_grad_norm = grads


def runs_in_triton(device: torch.device) -> bool:
    """Returns whether Triton's compiled kernels run on the device."""
    return device.type == "cuda" and why_no_triton() is None


def plain_scalars(
    grads: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
    clip_grad: float,
    counts: torch.Tensor | None,
    device: torch.device,
) -> StepScalars:
    """Computes the scalars in torch, with the bits of megatron-core's get_grad_norm_fp32 on a CPU; a collective call.

    Args:
        grads: this rank's part of the mean gradient; each element of the model once over all ranks.
        group: the ranks to sum over.
        clip_grad: largest norm; 0 turns clipping off.
        counts: if one of them is not above 0 the step is skipped, float64 [K]; or None.
        device: device of the result; a rank may have no gradients.
    """
    total = torch.zeros((), dtype=torch.float, device=device)
    if grads:
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, torch.float))) ** 2
    # A rank whose shard is empty adds 0: the collective needs every rank of the group.
    dist.all_reduce(total, group=group)
    norm = total.double().sqrt()
    coefficient = None
    if clip_grad > 0.0:
        # In float64, then rounded to float32: the bits are those of upstream's Python arithmetic.
        coefficient = (clip_grad / (norm + 1.0e-6)).clamp(max=1.0).float()
    # The norm is reduced over all ranks and is finite only if every gradient is, so all ranks skip the step alike.
    skips = ~torch.isfinite(norm)
    if counts is not None:
        skips = skips | ~(counts > 0).all()
    return StepScalars(norm, coefficient, skips.float())


class TritonNorm:
    """The same in two launches, with tables that stay on the device while no gradient moves.

    Args:
        device: the gradients' device.
        group: the ranks to sum over.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self.device, self.group = device, group
        self.programs = PROGRAMS_INTERPRETED if triton_kernel() == "interpreted" else PROGRAMS
        self.partials = torch.zeros(self.programs, dtype=torch.float64, device=device)
        self.norm = torch.zeros(1, dtype=torch.float64, device=device)
        self.multipliers = torch.ones(2, dtype=torch.float32, device=device)
        self.clip_grad = torch.zeros(1, dtype=torch.float64, device=device)
        self.clips_at = 0.0  # the value in `clip_grad`
        self.found_inf = torch.zeros(1, dtype=torch.float32, device=device)
        self.addresses: list[tuple[int, int, torch.dtype, int]] | None = None
        self.tables: list[tuple[torch.dtype, bool, torch.Tensor, torch.Tensor]] = []

    def scalars(
        self,
        grads: Sequence[torch.Tensor],
        replicas: Sequence[torch.Tensor],
        clip_grad: float,
        *,
        divisor: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> StepScalars:
        """Computes the scalars; a collective call. The next call overwrites the result.

        Args:
            grads: contiguous float32, bfloat16 or float16 tensors: this rank's part of the gradient.
            replicas: tensors that another rank counts; they must be finite as well.
            clip_grad: largest norm; 0 turns clipping off.
            divisor: count that the gradients were summed over and are divided by, float64 [1]; or None.
            counts: if one of them is not above 0 the step is skipped, float64 [K]; or None.
        """
        self._fit_tables(grads, replicas)
        if clip_grad != self.clips_at:
            self.clips_at = clip_grad
            self.clip_grad.copy_(upload(torch.tensor([clip_grad], dtype=torch.float64), self.device))
        if not self.tables:
            self.partials.zero_()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._launch(clip_grad, divisor, counts)
        multipliers = self.multipliers if divisor is not None else self.multipliers[1:]
        multipliers = multipliers if clip_grad > 0.0 else multipliers[:-1]
        return StepScalars(self.norm.view(()), multipliers if len(multipliers) else None, self.found_inf.view(()))

    def _launch(self, clip_grad: float, divisor: torch.Tensor | None, counts: torch.Tensor | None) -> None:
        from .norm_kernels import scalars_kernel, square_sum_kernel

        for number, (dtype, aligned, rows, chunks) in enumerate(self.tables):
            square_sum_kernel[(self.programs,)](
                rows,
                chunks,
                len(chunks),
                divisor,
                self.partials,
                GRAD_TYPE=TYPES[dtype],
                HAS_DIVISOR=divisor is not None,
                ADD=number > 0,
                ALIGNED=aligned,
                PROGRAMS=self.programs,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(self.partials, group=self.group)
        scalars_kernel[(1,)](
            self.partials,
            divisor,
            counts,
            self.norm,
            self.multipliers,
            self.found_inf,
            self.clip_grad,
            NUM_COUNTS=0 if counts is None else len(counts),
            HAS_DIVISOR=divisor is not None,
            CLIPS=clip_grad > 0.0,
            PROGRAMS=self.programs,
            num_warps=4,
            enable_fp_fusion=False,
        )

    def _fit_tables(self, grads: Sequence[torch.Tensor], replicas: Sequence[torch.Tensor]) -> None:
        """Makes the tables again if a gradient is another one than before, or is elsewhere."""
        addresses = [
            (grad.data_ptr(), grad.numel(), grad.dtype, counts)
            for counts, tensors in ((1, grads), (0, replicas))
            for grad in tensors
            if grad.numel()
        ]
        if addresses == self.addresses:
            return
        self.addresses, self.tables = addresses, []
        for dtype in dict.fromkeys(dtype for _, _, dtype, _ in addresses):
            rows = [(address, numel, counts) for address, numel, kind, counts in addresses if kind == dtype]
            aligned = not any(address % 16 for address, _, _ in rows)
            chunks = chunk_table([numel for _, numel, _ in rows], BLOCK)
            self.tables.append(
                (
                    dtype,
                    aligned,
                    upload(torch.tensor(rows, dtype=torch.int64), self.device),
                    upload(chunks, self.device),
                )
            )
