"""This rank's random states: reading, setting, and keeping them through a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import tensor_parallel


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's random states: torch's default generators and megatron-core's dropout tracker."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.clone() for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random states back after a block, so that what ran inside leaves the training that goes on untouched."""
    states = rng_state()
    try:
        yield
    finally:
        set_rng_state(states)
