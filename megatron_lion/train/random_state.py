"""Gets and sets this rank's random states, and restores them after a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import tensor_parallel


def rng_state() -> dict[str, torch.Tensor]:
    """Returns copies of this rank's random states: torch's default generators and megatron-core's dropout tracker.

    Returns:
        uint8 tensors by name: "torch", "cuda" if a CUDA device is present, and "tracker.NAME".
    """
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.clone() for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Sets the random states that `rng_state` returned."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states after a block, so that random numbers drawn inside do not change later training."""
    states = rng_state()
    try:
        yield
    finally:
        set_rng_state(states)
