"""Chooses how a LION step is computed on this machine, and computes it with one of the ways that keep no tables.

`lion.py` needs this file for everything but the plain equations of update.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import triton_check
from .update import Slot, reference_step

if TYPE_CHECKING:
    from .lion import Lion

# Compiling the C++ loop takes one to two seconds, once a machine. It saves 5 ms (float32) to 45 ms (int8) a step for each
# 2^20 elements. Smaller models, and tests, use it only if it is compiled already.
CPP_PAYS = 2**20


def check_implementation(implementation: str) -> None:
    """Raises ValueError if it can never run on this machine, as far as that is known without compiling anything."""
    if implementation != "triton" or torch.cuda.is_available():
        return
    if (reason := triton_check.why_no_triton()) == triton_check.NO_DEVICE:
        raise ValueError(f"implementation = 'triton': {reason}; or use implementation = 'auto'")


def choose_implementation(implementation: str, slots: Sequence[Slot]) -> str:
    """Returns the implementation of a step.

    Args:
        implementation: the optimizer's setting.
        slots: the parameters of the step.

    Raises:
        ValueError: the implementation does not work on the parameters' device.
        RuntimeError: Triton or the C++ compiler does not work on this machine.
    """
    if implementation == "triton" and slots:
        if (reason := triton_check.why_no_triton()) is not None:
            raise RuntimeError(f"implementation = 'triton': {reason}; or use implementation = 'foreach'")
        if not all(slot.param.is_cuda for slot in slots) and triton_check.triton_kernel() == "compiled":
            raise ValueError(
                "implementation = 'triton' with parameters that are not on a CUDA device: move the model there before the "
                "first step, or use implementation = 'auto'"
            )
    if implementation not in ("auto", "cpp"):
        return implementation
    on_cpu = all(slot.param.device.type == "cpu" for slot in slots)
    if implementation == "cpp" and not on_cpu:
        raise ValueError("implementation = 'cpp' with parameters that are not on the CPU: use 'auto'")
    if on_cpu and (implementation == "cpp" or slots):
        from .cpp import library

        pays = implementation == "cpp" or sum(slot.param.numel() for slot in slots) >= CPP_PAYS or library.is_built()
        if pays and library.why_not() is None:
            return "cpp"
        if implementation == "cpp":
            raise RuntimeError(f"implementation = 'cpp': {library.why_not()}; or use implementation = 'foreach'")
    fits = slots and all(slot.param.is_cuda and slot.param.dtype != torch.float64 for slot in slots)
    if not fits:
        return "foreach"
    if (reason := triton_check.why_no_triton()) is not None:
        triton_check.warn_once(reason)
        return "foreach"
    return "triton"


def step_without_tables(
    optimizer: Lion, implementation: str, slots: Sequence[Slot], begin: bool, multiplier: torch.Tensor | None
) -> None:
    """Takes a step with an implementation that keeps no tables between steps.

    Args:
        optimizer: has the layout and Cautious LION's settings.
        implementation: "reference", "foreach" or "cpp".
        slots: the parameters of the step.
        begin: whether a momentum that is NaN has not begun and takes the gradient (m_0 = g_1).
        multiplier: one or two elements that every gradient is multiplied by in turn, or None.
    """
    take_step = reference_step
    if implementation == "foreach":
        from .foreach import foreach_step as take_step
    elif implementation == "cpp":
        from .cpp import cpp_step as take_step
    if optimizer.cautious:
        from .cautious import count_agreement, with_caution

        if implementation == "cpp":
            from .cpp import count_agreement
        agreement = count_agreement(slots, optimizer.layout, begin, multiplier)
        slots = with_caution(slots, agreement, optimizer.sum_agreement)
    take_step(slots, optimizer.layout, begin, multiplier)
