"""Measures tasks on checkpoints over all ranks, writes and reuses results, and follows a run in training."""

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
from megatron_lion.parallel import agree


class Model(Protocol):
    """Weights at one or more steps: a run (`open_run.RestoredRun`) or a Hugging Face folder (`HuggingFaceModel`)."""

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
    """A result.

    Attributes:
        record: the JSON object of the result.
        path: its file.
        is_new: whether it is measured in this call; False if it is read from `path`.
    """

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
    """Measures the tasks of one checkpoint that have no result yet; a collective call, the same on every rank.

    Args:
        model: a run or a Hugging Face model.
        step: the step of the checkpoint.
        tasks: the measurements.
        folder: the evaluation folder, in which rank 0 reads earlier results and writes new ones.
        batch_size: windows in one forward pass on one rank.
        progress: called with a task and the step before the measurement; returns the task's progress callback.

    Yields:
        One outcome for each task, in order.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model.
        NumericsError: the model's loss is NaN or infinite.
        StorageError: the file system refused a result.
    """
    state = model.state_sha256(step)
    earlier = [task.find(folder, step, state) for task in tasks]
    # Rank 0 decides and the others add zeros: if ranks found different files, some would wait in a collective call
    # that the others skip.
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
        with agree("writing the result"):
            if model.rank == 0:
                write_result(path, record)
        yield Outcome(record=record, path=path, is_new=True)


def follow(model: Model, list_steps: Callable[[], list[int]], last_step: int, poll_s: float = 10.0) -> Iterator[int]:
    """Yields the steps of a run in training as their checkpoints appear, until the last one; the same on every rank.

    Args:
        model: the run; new steps are added to its `steps`.
        list_steps: returns the steps that have a complete checkpoint now.
        last_step: the last step of training.
        poll_s: seconds between two calls of `list_steps`.
    """
    done: set[int] = set()
    while last_step not in done:
        fresh = [step for step in list_steps() if step not in done] if model.rank == 0 else []
        # The others add 0, so the sum is rank 0's step: all ranks evaluate the same checkpoint. 0 means no new one.
        step = int(model.all_reduce_sum(torch.tensor([float(fresh[0] if fresh else 0)], dtype=torch.float64)))
        if step == 0:
            time.sleep(poll_s)
            continue
        done.add(step)
        model.steps = sorted({*model.steps, step})
        yield step
