"""A stop signal before there is anything to save ends a run at once; one in a measurement does not wait for its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch.distributed as dist
from distributed import run_distributed
from job_processes import REPO
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_lion.device import Device
from megatron_lion.errors import PeerError, StoppedOnRequest
from megatron_lion.jobs import STORE
from megatron_lion.rendezvous import join_job
from megatron_lion.signals import IN_START, STOP_SIGNALS, StopNow, stop_raises, stop_signals
from megatron_lion.train import checkpoint_tensors


@pytest.fixture
def alone_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of rank 0 of a job whose rank 1 never comes; returns the path of their store."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", STORE: str(tmp_path / "store")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "store"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_wait_for_a_peer(number: signal.Signals, alone_of_two: Path) -> None:
    def send() -> None:
        while not alone_of_two.exists() or b"joined" not in alone_of_two.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(StoppedOnRequest, match=IN_START), stop_signals() as stop:
        join_job(Device("cpu", 0, "gloo"), 250)
    assert stop["now"]
    assert not dist.is_initialized()


JOINS = """
import sys
from megatron_lion.device import Device
from megatron_lion.errors import StoppedOnRequest
from megatron_lion.exit_report import report
from megatron_lion.rendezvous import join_job
from megatron_lion.signals import stop_signals
try:
    with stop_signals():
        join_job(Device("cpu", 0, "gloo"), 600)
except StoppedOnRequest as error:
    report(error)
    sys.exit(75)
"""


def test_a_signal_ends_the_wait_for_the_first_connection(alone_of_two: Path, tmp_path: Path) -> None:
    """Rank 1 said that it came, and was stopped before it connected: rank 0 waits in C++, where no handler runs."""
    store = dist.FileStore(str(alone_of_two), 2)
    store.set("joined/1", "")
    store.add("joined", 1)
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([sys.executable, "-c", JOINS], cwd=REPO, stderr=err)
    try:
        while b"group/" not in alone_of_two.read_bytes() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "err").read_text().count(IN_START) == 1


def test_a_peer_that_does_not_come_is_named(alone_of_two: Path) -> None:
    with pytest.raises(PeerError, match=r"ranks 1 of 2 did not join the job within 0 s \(parallel.timeout_s\)"):
        join_job(Device("cpu", 0, "gloo"), 0.1)


def test_only_the_first_signal_counts() -> None:
    """Launchers and schedulers send more than one; the reason of the inner block is kept."""
    with pytest.raises(StoppedOnRequest, match="inner"):
        stopped_twice()
    with pytest.raises(StoppedOnRequest, match="outer"), stop_raises("outer"):
        signal.raise_signal(signal.SIGQUIT)


@pytest.mark.parametrize("block", [stop_raises(IN_START), stop_signals()], ids=["stop_raises", "stop_signals"])
def test_no_catch_all_takes_a_stop_for_a_fault(block: Any) -> None:
    """As a package that turns every Exception of a file's reader into one error of its own does."""
    with pytest.raises(StoppedOnRequest, match=IN_START):
        swallow(block)


def swallow(block: Any) -> None:
    with block:
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("the stop was swallowed")


def test_a_stop_that_was_lost_counts_at_the_next_block() -> None:
    """Python drops an exception that is raised in a finalizer."""
    with pytest.raises(StoppedOnRequest, match=IN_START):
        lose_one()


def lose_one() -> None:
    with stop_raises("outer"):
        with contextlib.suppress(StopNow):
            signal.raise_signal(signal.SIGTERM)
        with stop_signals():
            pytest.fail("the stop was lost")


def stopped_twice() -> None:
    with stop_raises("outer"):
        try:
            with stop_signals() as stop:
                stop["at_once"] = False
                signal.raise_signal(signal.SIGTERM)
                assert stop["now"]
                raise StoppedOnRequest("inner")
        finally:
            signal.raise_signal(signal.SIGHUP)


# Sends the signal when torch's import begins.
IN_IMPORT = """
import os, signal, sys
def send(event, arguments):
    if event == "import" and arguments[0] == "torch":
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
sys.addaudithook(send)
from megatron_lion.cli import main
sys.exit(main(["pretrain", "--config", sys.argv[2]]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_in_the_import_of_torch(name: str, code: int, tmp_path: Path) -> None:
    from megatron_lion.configfile import dump_config

    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny.tiny_config(tmp_path / "run", str(tmp_path / "prefix"))))
    (tmp_path / "prefix.idx").touch()
    done = subprocess.run(
        [sys.executable, "-c", IN_IMPORT, name, str(config)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr == f"megatron-lion: {IN_START if code == 75 else 'interrupted'}\n"
    assert not (tmp_path / "run").exists()


SETTINGS = {"train__steps": 6, "train__test_every": 3, "train__test_batches": 5, "model__hidden_dropout": 0.1}
"""Five global batches of four micro-batches on each of two ranks, for each split."""


def stopped_in_measurement(rank: int, config: Any, at_step: int) -> tuple[tuple[str, str], int]:
    """Trains; rank 1 is asked to stop in the first micro-batch of the held-out measurement of a step.

    Returns the error and the number of held-out micro-batches that were read after the signal.
    """
    from megatron_lion.train.run import Run

    read = 0
    original = Run.held_out_batches

    def counted(self: Run, split: int) -> Iterator[Any]:
        nonlocal read
        for batch in original(self, split):
            if self.step >= at_step:
                read += 1
                if rank == 1 and read == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    Run.held_out_batches = counted
    return tiny.error_of(tiny.train, config), read


@pytest.mark.parametrize("at_step", [3, 6])
def test_a_signal_in_a_held_out_measurement(at_step: int, tmp_path: Path) -> None:
    """It ends after the batch at hand, and the resumed run measures what is missing; the last step's, too."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config, twin = (tiny.tiny_config(tmp_path / name, corpus, **SETTINGS) for name in ("run", "twin"))
    then = "resumes" if at_step < 6 else "makes the measurements that are missing"
    for (kind, message), read in run_distributed(stopped_in_measurement, 2, config, at_step):
        assert (kind, message) == (
            "StoppedOnRequest", f"stopped after step {at_step} of 6, checkpoint saved; the same command {then}",
        )  # fmt: skip
        assert read == 4, "one of ten global batches"
    lines = tiny.read_metrics(config.run_dir)
    assert not [line for line in lines if line["step"] == at_step and "valid/loss" in line]
    results = run_distributed(tiny.train_each, 2, {"run": config, "twin": twin})[0]
    found, wanted = results["run"], results["twin"]
    assert found["manifest"]["state_fingerprint"] == wanted["manifest"]["state_fingerprint"]
    assert held_out(config.run_dir) == held_out(twin.run_dir)
    assert sorted(held_out(twin.run_dir)) == [0, 3, 6]


def held_out(run_dir: str) -> dict[int, tuple[float, float]]:
    lines = [line for line in tiny.read_metrics(run_dir) if "valid/loss" in line]
    return {line["step"]: (line["valid/loss"], line["test/loss"]) for line in lines}


@pytest.mark.parametrize("place", ["metadata", "tensors"])
def test_a_stop_while_a_checkpoint_is_read_is_no_damage(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler raises at any line, also inside torch's reader, which catches every BaseException."""

    def stop_in_torch(self: object, sharded: object, folder: Path) -> None:
        _DistWrapper(None, False, 0).all_reduce("read", lambda: stop() or [], sum)

    def stop(*arguments: object, **settings: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    (tmp_path / ".metadata").write_bytes(b"")
    monkeypatch.setattr(checkpoint_tensors._MetadataUnpickler, "load", stop)
    monkeypatch.setattr(checkpoint_tensors.TorchDistLoadShardedStrategy, "load", stop_in_torch)
    read = {
        "metadata": lambda: checkpoint_tensors.check_metadata(tmp_path / ".metadata", []),
        "tensors": lambda: checkpoint_tensors.read_tensors({}, tmp_path),
    }[place]
    with pytest.raises(StoppedOnRequest, match="stopped"), stop_raises("stopped"):
        read()
