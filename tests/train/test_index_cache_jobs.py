"""The index cache of several jobs, of a resumed run, and of nodes with folders of their own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed  # its fork server has imported torch and megatron-core
import numpy as np
import pytest
import tiny
from index_samples import (
    DAMAGE,
    index_files,
    left_in,
    megatrons_own,
    read_gpt,
    reported,
)

from megatron_lion.data.index_cache import index_folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    return [tiny.write_corpus(folder / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_job_waits_and_takes_the_files_of_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    building, go = threading.Event(), threading.Event()
    builds: list[str] = []

    def build(folder: Path) -> list[Any]:
        builds.append(threading.current_thread().name)
        (folder / "text").write_text("content")
        building.set()
        assert go.wait(60)
        return ["content"]

    def work() -> None:
        found.append(index_folder(tmp_path, "0" * 64, {"a": 1}, build))

    found: list[Path] = []
    jobs = [threading.Thread(target=work, name=name) for name in ("first", "second")]
    jobs[0].start()
    assert building.wait(60)
    jobs[1].start()
    wait_until(lambda: any("waiting for it" in record.getMessage() for record in caplog.records))
    assert f"in use by another job (pid {os.getpid()} on " in reported(caplog)[0]
    go.set()
    for job in jobs:
        job.join(60)
    assert builds == ["first"]
    assert len(found) == 2
    assert found[0] == found[1]
    assert (found[0] / "text").read_text() == "content"


def build_at_once(paths: list[str], cache: str, result: str, barrier: Any) -> None:
    """Work of a process: waits for the others, then builds and saves the samples."""
    barrier.wait(60)
    np.save(result, read_gpt(paths, [3.0, 1.0], Path(cache)))


@pytest.mark.slow
def test_jobs_that_start_at_the_same_moment(corpora: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(4)
    results = [tmp_path / f"{number}.npy" for number in range(4)]
    jobs = [
        context.Process(target=build_at_once, args=(corpora, str(tmp_path / "cache"), str(result), barrier))
        for result in results
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(200)
    expected = megatrons_own(corpora, [3.0, 1.0], tmp_path / "megatron")
    assert [np.array_equal(np.load(result), expected) for result in results] == [True] * 4
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert not left_in(tmp_path / "cache")


def train_and_listen(rank: int, config: Any) -> tuple[Any, list[str]]:
    """Work of one process: trains, and returns the outcome and the warnings of its log file."""
    result = tiny.train(config)
    log = next(Path(config.run_dir, "log").glob(f"*{rank}*")).read_text()
    return result, [line for line in log.splitlines() if "WARNING megatron_lion" in line]


def test_a_resumed_run_reads_the_same_samples(corpora: list[str], tmp_path: Path) -> None:
    """On two processes: whole, and with every array of the cache full of zeros between two jobs."""
    config = tiny.tiny_config(
        tmp_path / "whole", corpora[0], train__steps=4, train__micro_batch_size=4, train__test_every=2, probe__every=2,
        probe__num_batches=2,
    )  # fmt: skip
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    whole = distributed.run_distributed(tiny.train_each, 2, {"": config})[0][""]
    half = dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=2))
    distributed.run_distributed(tiny.train_each, 2, {"": half})
    arrays = index_files(tmp_path / "cut" / "cache", ".npy")
    assert len({path.parent for path in arrays}) == 2, "of training and of the probe"
    for path in arrays:
        path.write_bytes(DAMAGE["zeros"](path.read_bytes()) or b"")
    (outcome, lines), (_, others) = distributed.run_distributed(train_and_listen, 2, cut)
    assert outcome["losses"] == whole["losses"]
    assert outcome["probes"][-1]["probe/loss"] == whole["probes"][-1]["probe/loss"]
    assert outcome["manifest"]["state_fingerprint"] == whole["manifest"]["state_fingerprint"]
    assert len([line for line in lines if "building them again" in line]) == 2, "one for each folder of index files"
    assert not others


def open_in_own_folder(rank: int, paths: list[str], folder: str, damage: bool) -> tuple[str, str]:
    cache = Path(folder) / ("shared" if damage else f"node{rank}")
    if damage and rank == 1:
        os.environ["LOCAL_RANK"] = "0"
    return tiny.error_of(read_gpt, paths, None, cache)


def test_a_cache_that_the_nodes_do_not_share_is_named(corpora: list[str], tmp_path: Path) -> None:
    errors = distributed.run_distributed(open_in_own_folder, 2, corpora[:1], str(tmp_path), False)
    for kind, message in errors:
        assert kind == "StorageError"
        assert "rank 1 on" in message
        assert "set data.cache to a folder that all nodes share" in message
    errors = distributed.run_distributed(open_in_own_folder, 2, corpora[:1], str(tmp_path), True)
    assert errors == [("", "")] * 2
