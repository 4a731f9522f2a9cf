"""Runs a verb on several ranks, each a real process with the command line's exit, so that ranks can be killed or stopped."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 - its fork server has imported torch and megatron-core
import torch
import torch.distributed as dist


@dataclasses.dataclass
class Ended:
    """How the ranks of a job ended.

    Attributes:
        codes: exit codes in rank order; negative for a signal.
        errors: each rank's stderr.
        files: contents of the exit files by rank.
        order: ranks in the order in which they wrote their exit files.
    """

    codes: list[int]
    errors: list[str]
    files: dict[int, dict[str, Any]]
    order: list[int]

    def lines(self, rank: int) -> list[str]:
        """Lines that the command line or the watch wrote on a rank's stderr."""
        return [line for line in self.errors[rank].splitlines() if line.startswith("megatron-lion")]


def _rank(
    rank: int, world_size: int, folder: str, fault: Callable[..., None], arguments: tuple[Any, ...], words: list[str]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", MEGATRON_LION_EXIT_DIR=f"{folder}/exits",
    )  # fmt: skip
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    os.dup2(os.open(f"{folder}/err{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # One store file, as the launcher gives the ranks of one node; the limit is that of tests, not of the run.
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    fault(rank, *arguments)
    from megatron_lion.cli import main
    from megatron_lion.exit_report import leave_at_once

    leave_at_once(main(words))


def no_fault(rank: int) -> None:
    """Prepares nothing."""


def run_ranks(
    words: list[str],
    world_size: int = 2,
    fault: Callable[..., None] = no_fault,
    *arguments: Any,
    limit_s: float = 240,
) -> Ended:
    """Runs `megatron-lion WORDS` on several ranks of this machine to their end.

    Args:
        words: the command line.
        world_size: number of ranks.
        fault: module-level function that prepares a fault in a rank's process, called as `fault(rank, *arguments)`.
        arguments: for `fault`.
        limit_s: ample limit of the whole job; a rank that lives longer counts as stuck.

    Raises:
        AssertionError: a rank did not end.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/exits")
        processes = [
            context.Process(target=_rank, args=(rank, world_size, folder, fault, arguments, words))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(limit_s)
            errors = [Path(folder, f"err{rank}").read_text(errors="replace") for rank in range(world_size)]
            stuck = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            assert not stuck, f"ranks {stuck} are stuck: {errors}"
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        found = sorted(Path(folder, "exits").glob("exit.*.json"), key=lambda path: path.stat().st_mtime_ns)
        contents = [json.loads(path.read_text()) for path in found]
        return Ended(
            [int(process.exitcode or 0) for process in processes],
            errors,
            {content["rank"]: content for content in contents},
            [content["rank"] for content in contents],
        )
