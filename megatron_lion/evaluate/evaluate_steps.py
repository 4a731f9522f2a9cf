"""Measures tasks on checkpoints: decides what is new, runs it over the ranks, writes it, follows a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lion.evaluate.tasks import Task, write_result
from megatron_lion.evaluate.token_scores import DetailedScorer, OnWindows, Scorer, score_segments


class Model(Protocol):
    """Something with weights at one or more steps: a run (`restore.RestoredRun`) or a Hugging Face folder."""

    steps: list[int]

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def load(self, step: int) -> None: ...
    def scorer(self) -> Scorer | DetailedScorer: ...
    def state_sha256(self, step: int) -> str: ...
    def all_reduce_sum(self, values: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A result and whether it was measured now or found from an earlier time."""

    record: dict[str, Any]
    path: Path
    is_new: bool


def evaluate_step(
    model: Model,
    step: int,
    tasks: list[Task],
    folder: Path,
    *,
    batch_size: int,
    progress: Callable[[Task, int], OnWindows] | None = None,
) -> Iterator[Outcome]:
    """Measures what is not yet measured of one checkpoint; a collective call, the same on every rank.

    Args:
        model: where the weights come from.
        step: its checkpoint.
        tasks: what to measure.
        folder: results are written and looked for there; the first rank's view decides.
        batch_size: windows in one forward pass on one rank.
        progress: gives the callback for a task about to be measured at a step.

    Yields:
        One outcome a task, in order.
    """
    state = model.state_sha256(step)
    earlier = [task.find(folder, step, state) for task in tasks]
    flags = torch.tensor([float(found is not None and model.rank == 0) for found in earlier], dtype=torch.float64)
    is_known = [flag > 0 for flag in model.all_reduce_sum(flags).tolist()]
    if not all(is_known):
        model.load(step)
    for task, found, known in zip(tasks, earlier, is_known, strict=True):
        path = task.path(folder, step)
        if known:
            yield Outcome(record=found or {}, path=path, is_new=False)
            continue
        started = time.perf_counter()
        scores = score_segments(
            task.segments,
            model.scorer(),
            seq_length=int(task.conditions["seq_length"]),
            rank=model.rank,
            world_size=model.world_size,
            batch_size=batch_size,
            all_reduce_sum=model.all_reduce_sum,
            progress=progress(task, step) if progress else None,
        )
        record = task.record(scores, step=step, state_sha256=state, seconds=time.perf_counter() - started)
        if model.rank == 0:
            write_result(path, record)
        yield Outcome(record=record, path=path, is_new=True)


def follow(model: Model, list_steps: Callable[[], list[int]], last_step: int, poll_s: float = 10.0) -> Iterator[int]:
    """Steps of a run in training as their checkpoints appear, until its last one; every rank gets the same.

    Args:
        model: the run; its `steps` are kept up to date.
        list_steps: reads the steps that have a complete checkpoint now.
        last_step: where training ends.
        poll_s: seconds between two looks.
    """
    done: set[int] = set()
    while last_step not in done:
        fresh = [step for step in list_steps() if step not in done] if model.rank == 0 else []
        step = int(model.all_reduce_sum(torch.tensor([float(fresh[0] if fresh else 0)], dtype=torch.float64)))
        if step == 0:
            time.sleep(poll_s)
            continue
        done.add(step)
        model.steps = sorted({*model.steps, step})
        yield step
