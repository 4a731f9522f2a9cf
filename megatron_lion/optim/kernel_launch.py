"""Tables and launches for the Triton kernels: the host side of a fused step, which never waits for the device.

A step makes one launch for each kind of tensor. A kind is the device, the dtypes of parameter and gradient, the form of
the master weight, and whether all addresses are multiples of 16. A model has one kind, rarely two. The tables stay on the
device between steps and are sent again only if an address or a hyper-parameter changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl

from .agreement import agreement_kernel
from .cautious import factors
from .kernels import LR, SIGN, lion_kernel
from .tensor_tables import Row, hyper_parameters, master_form, row_of
from .update import PlainLayout, Slot

if TYPE_CHECKING:
    from .lion import Lion


class Shape(NamedTuple):
    """How the kernels divide a tensor.

    Attributes:
        block: elements a program.
        part: elements that a program reads, updates and writes at a time.
        warps: warps a program.
    """

    block: int
    part: int
    warps: int


# By the form of the momentum. Every array has the same layout over the threads, so they exchange no data.
# tests/optim/test_kernel_compiled.py reads instructions and registers from the compiler's output.
# Four elements a thread: float32 moves in 16-byte accesses, 16-bit data in 8-byte ones. 32 registers: an SM holds all 2,048
# threads.
PLAIN = Shape(1024, 1024, 8)
# int8: eight elements a thread, so that four threads hold a block of 32 and share the instructions for its scale; then eight
# more with the same addresses and hyper-parameters.
SHAPES = {"fp32": PLAIN, "bf16": PLAIN, "int8": Shape(2048, 1024, 4)}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Kind = tuple[torch.device, torch.dtype, torch.dtype, str, bool]


@dataclass
class LaunchTables:
    """The tables of one launch, and the values that they were made from.

    Attributes:
        rows: (addresses of parameter, gradient, momentum and master weight; elements; group; tensor) of every tensor.
        hyper: (decay, β1, 1-β1, β2, 1-β2, rate or 0, sign of the gradient) of every group.
        lrs: (address of the rate or 0) of every group.
        rows_table: `rows` on the device, int64.
        chunks_table: (row, chunk) of every program, int32.
        groups_table: `hyper` on the device, float32.
        lrs_table: address of every group's rate, int64: the tensor's own, or that of a column of `groups_table`.
    """

    rows: tuple[Row, ...]
    hyper: tuple[tuple[float, ...], ...]
    lrs: tuple[int, ...]
    rows_table: torch.Tensor
    chunks_table: torch.Tensor
    groups_table: torch.Tensor
    lrs_table: torch.Tensor

    def maximizes(self) -> bool:
        """Returns whether a group negates its gradients."""
        return any(group[SIGN.value] < 0 for group in self.hyper)


class Fleet:
    """The tables of all launches of a step, kept as long as no tensor moves.

    Rebuilding a tensor's row costs the host about ten times as much as checking that its address is unchanged.
    """

    def __init__(self, optimizer: Lion, slots: Sequence[Slot], old: Fleet | None) -> None:
        """Builds the tables for the slots; tables of the `old` fleet that are still valid are kept.

        Raises:
            ValueError: the kernel does not support a tensor's dtype.
        """
        self.layout = optimizer.layout
        self.cautious, self.sum_agreement = optimizer.cautious, optimizer.sum_agreement
        self.params = [slot.param for slot in slots]
        if self.cautious and slots:
            self.numels = upload(torch.tensor([param.numel() for param in self.params]), self.params[0].device)
        self.groups = list({id(slot.group): slot.group for slot in slots}.values())
        self.steps = [slot.state["step"] for slot in slots if "step" in slot.state]
        self.plans: dict[Kind, LaunchTables] = {}
        index = {id(group): number for number, group in enumerate(self.groups)}
        kinds: dict[Kind, list[Row]] = {}
        for number, slot in enumerate(slots):
            kind, row = _describe(slot, self.layout, index[id(slot.group)], number)
            kinds.setdefault(kind, []).append(row)
        for kind, rows in kinds.items():
            before = old.plans.get(kind) if old is not None else None
            self.plans[kind] = update_plan(before, tuple(rows), self.groups, kind[0], self.layout.momentum)
        self.signature = _signature(optimizer)

    def still_holds(self, optimizer: Lion) -> bool:
        """Returns whether groups, parameters, gradients and state all have the addresses in the tables."""
        return self.signature is not None and self.signature == _signature(optimizer)

    def step(self, begin: bool, multiplier: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Takes one LION step.

        Args:
            begin: whether a momentum that is NaN has not begun and takes the gradient (m_0 = g_1).
            multiplier: one or two elements that every gradient is multiplied by in turn, or None.
            found_inf: one element; if it is not 0, nothing is written. None: the step is taken.
        """
        # No tensor moved, but a hyper-parameter may have changed: a new plan if a group's rate is another tensor than before.
        self.plans = {
            kind: update_plan(plan, plan.rows, self.groups, kind[0], self.layout.momentum)
            for kind, plan in self.plans.items()
        }
        cautions = self._cautions(begin, multiplier) if self.cautious else None
        for kind, plan in self.plans.items():
            if len(plan.chunks_table):
                scalars = (_scalar(multiplier, kind[0]), _scalar(found_inf, kind[0]), cautions)
                launch(plan, kind, self.layout.momentum, begin, *scalars)
        if self.steps:
            # Added on the device: whether the step was skipped is known only there.
            found = _scalar(found_inf, self.steps[0].device)
            taken = 1.0 if found is None else torch.eq(found.view(()), 0).to(torch.float32)
            torch._foreach_add_(self.steps, taken)

    def _cautions(self, begin: bool, multiplier: torch.Tensor | None) -> torch.Tensor:
        """Returns φ of each tensor, float32 [tensors]; takes one more launch for each kind."""
        device = self.params[0].device
        counts = torch.zeros(len(self.params), dtype=torch.int64, device=device)
        for kind, plan in self.plans.items():
            if len(plan.chunks_table):
                count_agreement(plan, kind, self.layout.momentum, begin, _scalar(multiplier, kind[0]), counts)
        # One call for the tensors of all kinds: sum_agreement may be a collective, which all ranks call equally often.
        return factors(self.params, counts, self.numels, self.sum_agreement)


def _scalar(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else value.view(-1).to(device, torch.float32, non_blocking=True)


def _signature(optimizer: Lion) -> list[Any] | None:
    """Addresses of all tensors a step reads or writes, or None if computing them would cost as much as rebuilding the tables."""
    found: list[Any] = []
    state = optimizer.state
    try:
        for group in optimizer.param_groups:
            found.append(id(group))
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None)
                grad = param.grad if grad is None else grad
                if grad is None:
                    found.append(None)
                    continue
                if hasattr(param, "to_local"):
                    return None
                if not param.is_contiguous() or not grad.is_contiguous():
                    if param.stride() != grad.stride():
                        return None  # each step reads a new copy of the gradient
                    found.append(param.stride())
                own = state[param]
                places = [(value.data_ptr(), value.dtype, value.numel()) for value in own.values()]
                kinds = param.dtype, param.shape, grad.dtype, grad.shape
                found.append((param.data_ptr(), grad.data_ptr(), *kinds, *places))
    except RuntimeError:  # a sparse gradient has no address
        return None
    return found


def _describe(slot: Slot, layout: PlainLayout, group: int, number: int) -> tuple[Kind, Row]:
    param, grad = slot.param, slot.grad
    if param.dtype not in TYPES or grad.dtype not in TYPES:
        raise ValueError(
            f"implementation = 'triton' with a parameter of {param.dtype} and a gradient of {grad.dtype}: needs "
            "float32, bfloat16 or float16; use implementation = 'foreach'"
        )
    row = row_of(slot, layout, group, number)
    aligned = not any(address % 16 for address in row[:4])
    return (param.device, param.dtype, grad.dtype, master_form(slot, layout), aligned), row


def launch(
    plan: LaunchTables,
    kind: Kind,
    momentum: str,
    begin: bool,
    multiplier: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    cautions: torch.Tensor | None = None,
) -> None:
    """Launches the update kernel on the tensors of the plan."""
    device, param_dtype, grad_dtype, form, aligned = kind
    shape = SHAPES[momentum]
    # Triton launches on the current device, which need not be the parameters'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        lion_kernel[(len(plan.chunks_table),)](
            plan.rows_table,
            plan.chunks_table,
            plan.groups_table,
            plan.lrs_table,
            multiplier,
            found_inf,
            cautions,
            PARAM_TYPE=TYPES[param_dtype],
            GRAD_TYPE=TYPES[grad_dtype],
            MASTER_WEIGHTS=form,
            MOMENTUM=momentum,
            BEGIN=begin,
            CAUTIOUS=cautions is not None,
            MAXIMIZE=plan.maximizes(),
            NUM_MULTIPLIERS=0 if multiplier is None else multiplier.numel(),
            HAS_FOUND_INF=found_inf is not None,
            ALIGNED=aligned,
            BLOCK=shape.block,
            PART=shape.part,
            num_warps=shape.warps,
            enable_fp_fusion=False,  # a fused multiply-add rounds once instead of twice: other bits than the reference
        )


def count_agreement(
    plan: LaunchTables, kind: Kind, momentum: str, begin: bool, multiplier: torch.Tensor | None, counts: torch.Tensor
) -> None:
    """Adds to `counts` the number of elements of each tensor whose update has the sign of the gradient."""
    device, _, grad_dtype, _, aligned = kind
    shape = SHAPES[momentum]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        agreement_kernel[(len(plan.chunks_table),)](
            plan.rows_table,
            plan.chunks_table,
            plan.groups_table,
            multiplier,
            counts,
            GRAD_TYPE=TYPES[grad_dtype],
            MOMENTUM=momentum,
            BEGIN=begin,
            MAXIMIZE=plan.maximizes(),
            NUM_MULTIPLIERS=0 if multiplier is None else multiplier.numel(),
            ALIGNED=aligned,
            BLOCK=shape.block,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )


def update_plan(
    plan: LaunchTables | None,
    rows: tuple[Row, ...],
    groups: Sequence[dict[str, Any]],
    device: torch.device,
    momentum: str,
) -> LaunchTables:
    """Returns the tables for these tensors, groups and form of momentum; parts of the old plan that are still valid are kept."""
    hyper = tuple(_hyper_parameters(group, device) for group in groups)
    lrs = tuple(_lr_address(group["lr"], device) for group in groups)
    if plan is None or plan.rows != rows or plan.lrs != lrs:
        groups_table = torch.empty(len(groups), len(hyper[0]), dtype=torch.float32, device=device)
        # Column LR of each group in `groups_table`: the kernel reads every rate through an address.
        columns = [groups_table[index, LR.value :].data_ptr() for index in range(len(groups))]
        plan = LaunchTables(
            rows,
            (),
            lrs,
            upload(torch.tensor(rows, dtype=torch.int64), device),
            upload(chunk_table([row[4] for row in rows], SHAPES[momentum].block), device),
            groups_table,
            upload(torch.tensor([lr or column for lr, column in zip(lrs, columns, strict=True)]), device),
        )
    if plan.hyper != hyper:
        # In place: `lrs_table` holds addresses of this table.
        plan.groups_table.copy_(_pinned(torch.tensor(hyper, dtype=torch.float32), device), non_blocking=True)
        plan.hyper = hyper
    return plan


def chunk_table(numels: Sequence[int], block: int) -> torch.Tensor:
    """Returns (row, chunk) of every chunk of `block` elements, int32 [chunks, 2], for rows with these numbers of elements."""
    counts = torch.tensor([-(-numel // block) for numel in numels])
    rows = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack([rows, torch.arange(len(rows)) - first[rows]], dim=1).to(torch.int32)


def _lr_address(lr: float | torch.Tensor, device: torch.device) -> int:
    # The kernel reads float32 at this address. `Lion` refuses another dtype, but a scheduler may put one in later.
    if isinstance(lr, torch.Tensor) and lr.device == device and lr.dtype == torch.float32:
        return lr.data_ptr()
    return 0


def _hyper_parameters(group: dict[str, Any], device: torch.device) -> tuple[float, ...]:
    # A rate on the device is read there by its address; a rate in host memory is sent as a number.
    return hyper_parameters(group, 0.0 if _lr_address(group["lr"], device) else float(group["lr"]))


def _pinned(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns the table in pinned memory, which a copy to the device needs to be asynchronous.

    torch reuses the memory only after the copy is done.
    """
    return table if device.type == "cpu" else table.pin_memory()


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a table to the device without a wait."""
    return _pinned(table, device).to(device, non_blocking=True)
