"""`train.deterministic`: the same command on the same hardware and layout gives the same bits, on CUDA too.

On CUDA some kernels add their parts with atomics, in an order that changes from run to run: the backward passes of
flash, memory-efficient and cuDNN attention accumulate dQ in this way. cuBLAS may change its workspace with the stream,
and inductor may choose reductions by timing. None of this applies on a CPU, where the same code changes no bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# Workspaces of fixed size, in KiB and count: the two values that cuBLAS documents as reproducible.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Makes the block reproducible bit for bit, and restores every setting at its end, also after an exception.

    Enter it before process groups and model are made: cuBLAS and NCCL read their variables when they start. A process
    in which cuBLAS has already run without CUBLAS_WORKSPACE_CONFIG cannot change it any more; torch then raises at the
    first matrix product inside, and the variable has to be set before the process starts.

    Args:
        wanted: False changes nothing.

    Example:
        >>> with deterministic(True):
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not wanted:
        yield
        return
    with _environment(_variables(os.environ)), _torch_switches():
        yield


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that the libraries need; suitable values set by the user are kept."""
    workspace = environment.get("CUBLAS_WORKSPACE_CONFIG")
    return {
        "CUBLAS_WORKSPACE_CONFIG": workspace if workspace in CUBLAS_WORKSPACES else CUBLAS_WORKSPACES[0],
        # NVLS reduces inside the switch, in the order in which the parts arrive.
        "NCCL_ALGO": environment.get("NCCL_ALGO", "^NVLS"),
        # Read by Transformer Engine only. mcore 0.19.2: deterministic_mode is refused with its attention otherwise; remove when
        # it is not.
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _torch_switches() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    inductor = _inductor_config()
    # Without it inductor may choose another reduction kernel in another run, by timing. Not every torch has it. torch 2.13
    # keeps it per thread, so autograd's threads see only torch.are_deterministic_algorithms_enabled.
    has_inductor = hasattr(inductor, "deterministic")
    was_on, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    was_cudnn = cudnn.benchmark, cudnn.deterministic
    was_inductor = inductor.deterministic if has_inductor else None
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark, cudnn.deterministic = False, True
        if has_inductor:
            inductor.deterministic = True
        yield
    finally:
        # Inductor's last: use_deterministic_algorithms sets it too.
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        cudnn.benchmark, cudnn.deterministic = was_cudnn
        if has_inductor:
            inductor.deterministic = was_inductor


def _inductor_config() -> Any:
    import torch._inductor.config

    return torch._inductor.config
