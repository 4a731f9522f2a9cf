"""What the forked processes do: a command line, also with an action at a phase of the run."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

PHASES: dict[str, tuple[str, ...]] = {
    "rendezvous": ("torch.distributed:init_process_group",),
    "build": ("megatron_lion.train.loop:build_run",),
    "index": ("megatron.core.datasets.gpt_dataset:GPTDataset._build_document_sample_shuffle_indices",),
    "step": ("megatron_lion.train.loop:train_step",),
    "held-out": ("megatron_lion.train.loop:mean_losses",),
    "probe": ("megatron_lion.train.loop:probe_run",),
    "save": ("megatron_lion.train.checkpoint:write_tensors",),
    "end": ("torch.distributed:destroy_process_group",),
}
"""Functions whose call begins a phase; the first that exists is used."""


def command(words: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    from megatron_lion.cli import main

    return main(words)


def at_phase(phase: str, call: int, action: str, marker: str, words: list[str]) -> int:
    """Runs a command line; at the n-th call of a phase's function an action happens.

    Args:
        phase: a name of PHASES.
        call: number of the call, from 1.
        action: "kill", "stop", a signal's name, or "module:function" to call with the function's arguments.
        marker: file that is made before the action.
        words: the command line.
    """
    owner, name = _find(phase)
    original, count = getattr(owner, name), [0]

    def hooked(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            Path(marker).touch()
            if action in ("kill", "stop") or action.startswith("SIG"):
                number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(action) or signal.Signals[action]
                os.kill(os.getpid(), number)
            else:
                module, _, function = action.partition(":")
                getattr(importlib.import_module(module), function)(*arguments, **keywords)
        return original(*arguments, **keywords)

    setattr(owner, name, hooked)
    return command(words)


def _find(phase: str) -> tuple[Any, str]:
    for place in PHASES[phase]:
        module, _, path = place.partition(":")
        owner = importlib.import_module(module)
        *parts, name = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        if hasattr(owner, name):
            return owner, name
    raise LookupError(f"none of {PHASES[phase]} exists: add the function that begins the phase {phase}")
