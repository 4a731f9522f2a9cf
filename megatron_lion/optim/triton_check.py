"""Checks once a process whether Triton can compile and run a kernel on this machine.

Triton builds each kernel's launcher with the system's C compiler at the first launch. On a slim container without a
compiler or without Python.h that launch is the first optimizer step, so LION asks here first.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sysconfig
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

NO_DEVICE = "no CUDA device is visible to torch; set TRITON_INTERPRET=1 to run the kernel in Triton's interpreter"


def why_no_triton() -> str | None:
    """Returns the reason Triton cannot run kernels, in one line, or None if it can.

    The first call compiles and runs a one-element kernel and waits for its result; later calls return what it found.
    During the capture of a CUDA graph a first call returns None, because a wait would end the capture.
    """
    if _is_capturing() and not _check.cache_info().currsize:
        return None
    return _check()


def triton_kernel() -> str:
    """Returns "compiled", "interpreted", "not available: REASON" or "not needed without a CUDA device", for reports."""
    reason = why_no_triton()
    if reason == NO_DEVICE:
        return "not needed without a CUDA device"
    if reason is not None:
        return f"not available: {reason}"
    return "interpreted" if _is_interpreted() else "compiled"


@functools.cache
def warn_once(reason: str) -> None:
    """Logs once for each reason that LION runs without Triton."""
    logger.warning(
        "Triton cannot run kernels on this machine, so LION uses the slower foreach implementation: %s", reason
    )


@functools.cache
def _check() -> str | None:
    try:
        if not torch.cuda.is_available() and not _is_interpreted():
            return NO_DEVICE
        found = _add_one(2.0)
    except Exception as error:  # any of them would otherwise end the first optimizer step
        return _reason(error)
    return None if found == 3.0 else f"the compiled kernel computed 2 + 1 = {found:g}"


def _add_one(value: float) -> float:
    """Returns value + 1, computed by a kernel."""
    from .kernels import add_one_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Reading the result makes the host wait, which the caller may have forbidden; later steps never wait.
    mode = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    if mode is not None:
        torch.cuda.set_sync_debug_mode("default")
    try:
        source, target = torch.full((1,), value, device=device), torch.zeros(1, device=device)
        add_one_kernel[(1,)](source, target)
        return float(target)
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)


def _reason(error: Exception) -> str:
    """Returns what happened and what is needed, in one line, for an exception of import, compilation or launch."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "triton":
        return "triton is not installed; run pip install triton"
    if isinstance(error, FileNotFoundError) or "C compiler" in str(error):
        named = f" ({error.filename})" if isinstance(error, FileNotFoundError) and error.filename else ""
        return f"no C compiler{named}: Triton builds its launcher with one; install gcc or set CC"
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.exists():
            return f"no {header}: Triton builds its launcher with it; install Python's development files (python3-dev)"
        command = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
        return f"the C compiler {command} failed with exit code {error.returncode}; set CC to another compiler"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_interpreted() -> bool:
    try:
        import triton

        from .kernels import add_one_kernel
    except ImportError:
        return False
    return not isinstance(add_one_kernel, triton.JITFunction)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
