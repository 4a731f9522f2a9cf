"""A rank that is killed, stopped, late or at fault: the others end with code 8 and name it; nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from rank_jobs import Ended, run_ranks

from megatron_lion.configfile import dump_config
from megatron_lion.errors import DataError

MOMENTS = {
    "step": "megatron_lion.train.loop.train_step",
    "save": "megatron_lion.train.checkpoint.write_tensors",
    "commit": "megatron_lion.train.checkpoint._write_rng",
    "held-out": "megatron_lion.train.loop.mean_losses",
    "index": "megatron_lion.train.run.build_datasets",
    "verify": "megatron_lion.train.checkpoint.check_metadata",
}
"""The function that begins each moment of a run."""


def at(rank: int, victim: int, moment: str, call: int, action: str) -> None:
    """Prepares: the victim meets its fate when the function of this moment is called for the n-th time."""
    if rank != victim:
        return
    import importlib

    module, _, name = MOMENTS[moment].rpartition(".")
    place = importlib.import_module(module)
    real, calls = getattr(place, name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            if action == "data error":
                raise DataError("the data holds token id 999")
            if action == "bug":
                raise KeyError("no such key")
            if action == "worker":
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action])
        return real(*args, **kwargs)

    setattr(place, name, faulty)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    tiny.write_corpus(folder / "corpus")
    return folder


def words(folder: Path, name: str, **changes: Any) -> list[str]:
    settings = {"train__steps": 8, "checkpoint__every": 2, "train__test_every": 3, "train__test_batches": 1, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(tiny.tiny_config(folder / name, str(folder / "corpus"), **settings)))
    return ["pretrain", "--config", str(path)]


def check_survivor(ended: Ended, rank: int, lost: int, what: str) -> None:
    """The survivor has code 8 and an exit file; its line names the rank, the host and the process."""
    assert ended.codes[rank] == 8, ended
    assert ended.files[rank]["exit_code"] == 8
    assert re.search(rf"lost rank {lost} \(.+, pid \d+\), .*{what}", ended.files[rank]["error"]), ended.files[rank]
    assert ended.files[rank]["error"].count("\n") == 0
    assert "Traceback" not in ended.errors[rank]


def test_a_killed_rank_is_named_at_once(folder: Path) -> None:
    ended = run_ranks(words(folder, "killed"), 2, at, 1, "step", 4, "kill")
    assert ended.codes[1] == -signal.SIGKILL
    check_survivor(ended, 0, 1, "whose process has ended")
    assert len(ended.lines(0)) == 1, ended.errors[0]


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_let_go(folder: Path) -> None:
    """A stopped process acts on no SIGTERM: the launcher would wait for it, so the others let it go on."""
    ended = run_ranks(words(folder, "stopped", parallel__timeout_s=10), 2, at, 1, "step", 4, "stop")
    check_survivor(ended, 0, 1, "which is stopped")
    assert ended.codes[1] == 8, "the stopped rank found its connections closed"
    assert ended.files[1]["error"].startswith("the other ranks gave up waiting for this one")
    assert len(ended.lines(0) + ended.lines(1)) == 1, ended.errors
    assert "Traceback" not in ended.errors[1]


def test_a_ranks_own_error_comes_first(folder: Path) -> None:
    """Its line, exit file and code are those of the error; the others name it and print no second line."""
    ended = run_ranks(words(folder, "own"), 2, at, 1, "step", 4, "data error")
    assert ended.codes == [8, 3], ended
    assert ended.order[0] == 1, "launchers return the code of the rank that failed first"
    assert re.search(r"rank 1 \(.+\) failed: the data holds token id 999", ended.files[0]["error"])
    assert ended.lines(0) == []
    assert ended.lines(1) == ["megatron-lion[rank 1]: the data holds token id 999"]
    assert "Traceback" not in "".join(ended.errors)


def test_a_ranks_killed_loader_worker_is_named_by_both_ranks(folder: Path) -> None:
    """It is a lost process of the job, in whichever call torch raises it; the last save stays."""
    ended = run_ranks(words(folder, "worker", data__num_workers=1), 2, at, 1, "step", 4, "worker")
    assert ended.codes == [8, 8], ended
    assert "Traceback" not in "".join(ended.errors)
    (line,) = ended.lines(1)
    assert re.search(r"worker process \(pid \d+\) was ended by SIGKILL.*fewer data.num_workers", line)
    assert re.search(r"rank 1 \(.+\) failed: the data loader's worker process", ended.files[0]["error"])
    assert ended.lines(0) == []
    assert [path.name for path in (folder / "worker" / "checkpoints").glob("step_*")] == ["step_0000002"]


def test_an_unexpected_exception_keeps_its_traceback_and_code(folder: Path) -> None:
    ended = run_ranks(words(folder, "bug"), 2, at, 1, "step", 4, "bug")
    assert ended.codes == [8, 1], ended
    assert ended.order[0] == 1
    assert ended.files[1]["exit_code"] == 1
    assert ended.errors[1].count("Traceback (most recent call last)") == 1
    assert "Traceback" not in ended.errors[0]


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"parallel__tensor_model_parallel_size": 2},
    "PP2": {"parallel__pipeline_model_parallel_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moment", ["step", "save", "commit", "held-out", "index"])
@pytest.mark.parametrize("victim", [0, 1])
def test_each_rank_killed_at_each_moment(folder: Path, layout: str, moment: str, victim: int) -> None:
    """The last save stays whole: the same command ends the run afterwards."""
    command = words(folder, f"{layout}-{moment}-{victim}", **LAYOUTS[layout])
    ended = run_ranks(command, 2, at, victim, moment, 1 if moment == "index" else 2, "kill")
    assert ended.codes[victim] == -signal.SIGKILL
    check_survivor(ended, 1 - victim, victim, "whose process has ended")
    assert run_ranks(command).codes == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "moment", "victim"),
    [("TP2", "step", 0), ("PP2", "step", 1), ("PP2", "step", 0), ("DP2", "commit", 1), ("DP2", "index", 0), ("DP2", "held-out", 0)],
)  # fmt: skip
def test_each_rank_stopped_at_each_moment(folder: Path, layout: str, moment: str, victim: int) -> None:
    """Also in stages with a time limit of their own: a rank that is known to be stopped is judged by timeout_s."""
    command = words(folder, f"stop-{layout}-{moment}-{victim}", parallel__timeout_s=10, **LAYOUTS[layout])
    ended = run_ranks(command, 2, at, victim, moment, 1 if moment == "index" else 2, "stop")
    check_survivor(ended, 1 - victim, victim, "which is stopped")
    assert ended.codes[victim] == 8, ended


@pytest.mark.slow
def test_a_killed_rank_among_four(folder: Path) -> None:
    """All survivors name the same rank; one of them prints the line."""
    command = words(folder, "four", parallel__tensor_model_parallel_size=2)
    ended = run_ranks(command, 4, at, 0, "step", 4, "kill")
    for rank in (1, 2, 3):
        check_survivor(ended, rank, 0, "whose process has ended")
    assert [len(ended.lines(rank)) for rank in range(4)] == [0, 1, 0, 0]


@pytest.mark.slow
def test_a_rank_killed_while_it_resumes(folder: Path) -> None:
    """A lost rank is not taken for a damaged checkpoint."""
    command = words(folder, "resumes")
    assert run_ranks([*command, "--max-steps", "4"]).codes == [0, 0]
    ended = run_ranks(command, 2, at, 1, "verify", 1, "kill")
    check_survivor(ended, 0, 1, "whose process has ended")
    assert run_ranks(command).codes == [0, 0]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_on_several_ranks(folder: Path) -> None:
    """All ranks end with the checkpoint's code, and one of them prints the line."""
    command = words(folder, "damaged")
    assert run_ranks(command).codes == [0, 0]
    manifest = folder / "damaged" / "checkpoints" / "step_0000008" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    ended = run_ranks(["probe", str(folder / "damaged"), "--steps", "8", "--num-batches", "1", "--device", "cpu"])
    assert ended.codes == [4, 4], ended
    assert len(ended.lines(0) + ended.lines(1)) == 1, ended.errors
    assert "Traceback" not in "".join(ended.errors)
