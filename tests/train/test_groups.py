"""Several runs in one process: each run closes its process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch.distributed as dist
from distributed import run_distributed

from megatron_lion.config import RunConfig
from megatron_lion.device import Device, install_cpu_stand_in
from megatron_lion.parallel import process_groups


def threads_after_each(rank: int, configs: list[RunConfig]) -> list[int]:
    """Counts the threads of this process's gloo groups after each run; the default group has some, too."""
    found = []
    for config in configs:
        tiny.train(config)
        dist.barrier()
        found.append(sum("gloo" in task.read_text() for task in Path("/proc/self/task").glob("*/comm")))
    return found


def test_runs_in_one_process_leave_no_groups_behind(tmp_path: Path) -> None:
    """megatron-core does not destroy its groups; each would keep two threads that wake up 100 times a second."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    layouts: list[dict[str, Any]] = [{}, {"parallel__tensor_model_parallel_size": 2}, {}]
    configs = [
        tiny.tiny_config(tmp_path / f"run{place}", corpus, train__steps=2, **layout)
        for place, layout in enumerate(layouts)
    ]
    for found in run_distributed(threads_after_each, 2, configs):
        assert found[0] > 0, found
        assert len(set(found)) == 1, found


def gloo_groups_for(rank: int, kind: str) -> list[str]:
    """Returns the names of megatron-core's gloo groups on a device of this kind; the job's backend stays gloo."""
    from megatron.core import parallel_state

    install_cpu_stand_in()
    with process_groups(Device(kind, 0, {"cuda": "nccl", "cpu": "gloo"}[kind])):
        return [name for name, value in vars(parallel_state).items() if name.endswith("_GLOO") and value is not None]


def test_no_gloo_groups_are_built_beside_the_others() -> None:
    """The distributed optimizer gathers its state over the data-parallel group, so nothing would use them."""
    for kind in ("cuda", "cpu"):
        assert run_distributed(gloo_groups_for, 2, kind) == [[], []]
