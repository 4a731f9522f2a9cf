"""LION on a CPU: one pass over each tensor in C++ (`lion.cpp`), in every precision mode.

`torch.compile` was measured first (2026-11-24, torch 2.13.0, one core of an EPYC, 7.8M parameters). A float32 step takes
4.0 ms after 13 CPU seconds of compiling. split32 takes 71 ms, because inductor does not vectorise int16. int8 momentum
takes 107 ms, with wrong bits unless `emulate_precision_casts` is set. Every mode, dtype and option is compiled separately.
`lion.cpp` compiles in one second for all of them and takes 3.7, 3.7 and 6.8 ms a step.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence

import torch

from .cautious import count_agreement as count_in_torch
from .cpp_compiler import Library
from .foreach import foreach_step
from .layouts import PackedLayout
from .tensor_tables import Row, hyper_parameters, master_form, row_of
from .update import PlainLayout, Slot, reference_step

logger = logging.getLogger(__name__)

# Numbers of the tensor forms in lion.cpp (enum Form).
DTYPES = {torch.float32: 1, torch.bfloat16: 2}
FORMS = {"none": 0, "fp32": 1, "bf16": 2, "int8": 3, "split32": 4, "split24": 5}


class _Work(ctypes.Structure):
    """The argument of lion.cpp's `lion_step`; the fields must match its struct Work."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("groups", ctypes.c_void_p),
        ("cautions", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("multipliers", ctypes.c_float * 2),
        ("begin", ctypes.c_int32),
        ("param", ctypes.c_int32),
        ("grad", ctypes.c_int32),
        ("master", ctypes.c_int32),
        ("momentum", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def cpp_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """Takes one LION step; float16 and float64 tensors go through `foreach_step`.

    The arguments are those of `megatron_lion.optim.update.reference_step`.
    """
    cautions = None
    if slots and slots[0].caution is not None:
        cautions = torch.stack([slot.caution for slot in slots if slot.caution is not None])
    _run(slots, layout, begin, multiplier, cautions=cautions)
    foreach_step([slot for slot in slots if not _suits(slot)], layout, begin, multiplier)


def count_agreement(
    slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None
) -> torch.Tensor:
    """Returns the counts of `megatron_lion.optim.cautious.count_agreement`, int64 [P]."""
    counts = torch.zeros(len(slots), dtype=torch.int64)
    _run(slots, layout, begin, multiplier, counts=counts)
    others = [number for number, slot in enumerate(slots) if not _suits(slot)]
    if others:
        counts[others] = count_in_torch([slots[number] for number in others], layout, begin, multiplier)
    return counts


def _suits(slot: Slot) -> bool:
    return slot.param.dtype in DTYPES and slot.grad.dtype in DTYPES


def _run(
    slots: Sequence[Slot],
    layout: PlainLayout,
    begin: bool,
    multiplier: torch.Tensor | None,
    *,
    cautions: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    loop: ctypes.CDLL | None = None,
) -> None:
    """Calls the compiled loop once for each combination of dtypes and master form, on the tensors that it supports."""
    groups = list({id(slot.group): slot.group for slot in slots}.values())
    index = {id(group): number for number, group in enumerate(groups)}
    kinds: dict[tuple[int, int, int], list[Row]] = {}
    for number, slot in enumerate(slots):
        if _suits(slot):
            kind = DTYPES[slot.param.dtype], DTYPES[slot.grad.dtype], FORMS[master_form(slot, layout)]
            kinds.setdefault(kind, []).append(row_of(slot, layout, index[id(slot.group)], number))
    # `hyper`, `table`, `cautions` and `counts` own the memory that the loop addresses; they must live until it returns.
    hyper = torch.tensor([hyper_parameters(group, float(group["lr"])) for group in groups], dtype=torch.float32)
    given = [] if multiplier is None else multiplier.view(-1).tolist()
    factors = (ctypes.c_float * 2)(*given, *[1.0] * (2 - len(given)))  # g · 1 is exactly g
    for (param, grad, master), rows in kinds.items():
        table = torch.tensor(rows, dtype=torch.int64)
        work = _Work(
            rows=table.data_ptr(),
            num_rows=len(rows),
            groups=hyper.data_ptr(),
            cautions=None if cautions is None else cautions.data_ptr(),
            counts=None if counts is None else counts.data_ptr(),
            multipliers=factors,
            begin=begin,
            param=param,
            grad=grad,
            master=master,
            momentum=FORMS[layout.momentum],
            threads=torch.get_num_threads(),
        )
        (loop or library.load()).lion_step(ctypes.byref(work))


def _same_bits(loop: ctypes.CDLL) -> bool:
    """Returns whether two steps of the compiled loop equal the reference bit for bit.

    FLAGS do not guarantee it: CXX may carry flags such as -Ofast.
    """
    # A generator for this check alone: drawing from torch's would change the dropout of the run that calls it.
    generator = torch.Generator().manual_seed(1)
    layout = PackedLayout("split32", "int8")
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    # 999 elements: a whole block of lion.cpp (512), a partial one, and an int8 block of fewer than 32.
    start, *gradients = (torch.randn(999, generator=generator) for _ in range(3))
    gradients[0][:3] = torch.tensor([0.0, float("nan"), float("inf")])
    ends = []
    for compiled in (False, True):
        param = start.to(torch.bfloat16)
        state = layout.new_state(param, 0.0)
        for grad in gradients:
            slots = [Slot(param, grad, state, group)]
            if compiled:
                _run(slots, layout, False, None, loop=loop)
            else:
                reference_step(slots, layout, False, None)
        ends.append([param.view(torch.int16), state["master_param"], state["exp_avg"]])
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


library = Library(
    "lion.cpp",
    lambda loop: None if _same_bits(loop) else "bits",
    "LION on the CPU uses the slower foreach path",
    logger,
)
