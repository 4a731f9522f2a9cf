"""After SIGTERM, SIGINT or SIGUSR1 a run finishes its step, saves, exits, and resumes with identical results."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.configfile import dump_config
from megatron_lion.signals import IN_START

REPO = Path(__file__).resolve().parents[2]
SETTINGS = {
    "train__steps": 60, "model__hidden_dropout": 0.1, "train__precision": "bf16", "train__test_every": 7, "train__test_batches": 1,
}  # fmt: skip

# Two measurements of the held-out losses are enough with workers.
WITH_WORKERS = {0: SETTINGS, 2: {**SETTINGS, "data__num_workers": 2, "train__test_every": 30}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def twins(folder: Path, corpus: str) -> dict[int, dict[str, Any]]:
    """The uninterrupted run on one and on two processes."""
    return {
        size: run_distributed(
            tiny.train_each, size, {"": tiny.tiny_config(folder / f"twin{size}", corpus, **SETTINGS)}
        )[0][""]
        for size in (1, 2)
    }


def lines_of(run_dir: str) -> int:
    path = Path(run_dir, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def signal_group(number: int) -> None:
    """Signals every process of the group from outside of it, as torchrun and GNU timeout do."""
    subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)


def asked_while_running(rank: int, jobs: dict[str, tuple[Any, int, str]]) -> dict[str, tuple[str, str]]:
    """Runs each job and signals it after a few steps (alone or as a group), in a save, or before the first step."""
    os.setpgid(0, 0)
    found = {}
    for name, (config, number, moment) in jobs.items():
        done = threading.Event()

        def send(config: Any = config, number: int = number, done: threading.Event = done) -> None:
            while lines_of(config.run_dir) < 6 and not done.is_set():
                time.sleep(0.002)
            if done.is_set():
                return
            if config.data.num_workers:
                signal_group(number)
            else:
                os.kill(os.getpid(), number)

        armed = [moment != "step"]

        def in_save(
            event: str,
            arguments: tuple[Any, ...],
            number: int = number,
            moment: str = moment,
            armed: list[bool] = armed,
        ) -> None:
            wanted = "checkpoints" if moment == "save" else "cache"
            if armed[0] and event == "os.mkdir" and wanted in str(arguments[0]):
                armed[0] = False
                os.kill(os.getpid(), number)

        if moment == "step":
            threading.Thread(target=send, daemon=True).start()
        else:
            sys.addaudithook(in_save)
        found[name] = tiny.error_of(tiny.train, config)
        done.set()
        armed[0] = False
    return found


MOMENTS = {
    "sharpest": ([("SIGTERM", "step"), ("SIGTERM", "save"), ("SIGQUIT", "start")], ["SIGTERM"]),
    "others": ([("SIGINT", "step"), ("SIGUSR1", "step"), ("SIGHUP", "step")], ["SIGINT", "SIGUSR1"]),
}
"""Signals to one process with their moments, and signals to the group of a process with loader workers."""


@pytest.mark.parametrize("chosen", ["sharpest", pytest.param("others", marks=pytest.mark.slow)])
def test_each_signal_at_each_moment(folder: Path, corpus: str, twins: dict[int, dict[str, Any]], chosen: str) -> None:
    """Between steps, while a checkpoint is written, and while the data's index is built."""
    alone, to_the_group = MOMENTS[chosen]
    jobs = {
        f"{name} {moment}": (
            tiny.tiny_config(folder / f"{name}-{moment}", corpus, checkpoint__every=10, **SETTINGS),
            int(signal.Signals[name]), moment,
        )
        for name, moment in alone
    }  # fmt: skip
    for number in (signal.Signals[name] for name in to_the_group):
        config = tiny.tiny_config(folder / f"{number.name}-workers", corpus, **WITH_WORKERS[2])
        jobs[f"{number.name} to the group with loader workers"] = config, int(number), "step"
    found = run_distributed(asked_while_running, 1, jobs)[0]
    stopped_at = {}
    for name, (config, _, moment) in jobs.items():
        kind, message = found[name]
        assert kind == "StoppedOnRequest", (name, message)
        if moment == "start":
            assert message == IN_START
            continue
        stopped_at[name] = tiny.outcome(config.run_dir)["manifest"]["step"]
        assert f"stopped after step {stopped_at[name]} of 60, checkpoint saved" in message
        assert len(tiny.outcome(config.run_dir)["losses"]) == stopped_at[name], "no finished step is lost"
        assert moment != "save" or stopped_at[name] == 11
    resumed = run_distributed(tiny.train_each, 1, {name: config for name, (config, _, _) in jobs.items()})[0]
    for name, result in resumed.items():
        assert result["losses"] == twins[1]["losses"], name
        assert result["manifest"]["state_fingerprint"] == twins[1]["manifest"]["state_fingerprint"], name


def wait_for_lines(process: subprocess.Popen[str], run_dir: str, count: int) -> None:
    while lines_of(run_dir) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_command_ends_with_75_and_the_same_command_resumes(
    folder: Path, corpus: str, twins: dict[int, Any], workers: int
) -> None:
    """The signal goes to the whole process group, loader workers included."""
    config = tiny.tiny_config(folder / f"command{workers}", corpus, **WITH_WORKERS[workers])
    path = folder / f"command{workers}.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "megatron_lion", "pretrain", "--config", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, start_new_session=True
    )
    wait_for_lines(process, config.run_dir, 5)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 75, error
    assert out == ""
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("megatron-lion: stopped after step ")
    assert last.endswith("checkpoint saved; the same command resumes")
    if workers:  # the resumed run is compared bit for bit in test_each_signal_at_each_moment
        assert tiny.outcome(config.run_dir)["manifest"]["step"] == len(tiny.outcome(config.run_dir)["losses"])
        return
    again = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"done: 60 of 60 steps in {config.run_dir}; loss: training ")
    assert "resuming after step" in again.stderr
    assert tiny.outcome(config.run_dir)["manifest"]["state_fingerprint"] == twins[1]["manifest"]["state_fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_under_torchrun(folder: Path, corpus: str, twins: dict[int, Any], workers: int) -> None:
    """torchrun sends SIGTERM to the process group of each rank; each rank writes the reason to its exit file."""
    config = tiny.tiny_config(folder / f"torchrun{workers}", corpus, **WITH_WORKERS[workers])
    path, exits = folder / f"torchrun{workers}.yaml", folder / f"exits{workers}"
    exits.mkdir()
    path.write_text(dump_config(dataclasses.replace(config)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "megatron_lion", "pretrain", "--config", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_LION_EXIT_DIR": str(exits)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment
    )
    wait_for_lines(process, config.run_dir, 5)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.count("checkpoint saved; the same command resumes") == 1, "one process reports it"
    step = tiny.outcome(config.run_dir)["manifest"]["step"]
    for rank in (0, 1):
        told = json.loads((exits / f"exit.{rank}.json").read_text())
        assert told["exit_code"] == 75
        assert f"stopped after step {step} of 60" in told["error"]
    resumed = run_distributed(tiny.train_each, 2, {"": config})[0][""]
    assert resumed["losses"] == twins[2]["losses"]
    assert resumed["manifest"]["state_fingerprint"] == twins[2]["manifest"]["state_fingerprint"]
