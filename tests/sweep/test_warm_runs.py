"""Runs that a sweep forks: when they are forked, and that they behave like runs of a new interpreter."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lion.sweep import warm_runs


def test_runs_are_forked_only_if_no_gpu_driver_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_runs.glob, "glob", lambda pattern: [])
    assert warm_runs.can_fork() == (sys.platform == "linux")
    monkeypatch.setattr(warm_runs.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia[" in pattern else [])
    assert not warm_runs.can_fork()


def run_in_child(words: list[str], threads: int | None) -> None:
    """Is a run in the child of a server whose imports left `threads` threads, or failed."""
    imported: Any = SimpleNamespace(THREADS=threads)
    if threads is not None:
        sys.modules["megatron_lion.train.warm_imports"] = imported

    def new_interpreter(*_: Any) -> None:
        os._exit(77)

    vars(os)["execv"] = new_interpreter
    warm_runs._run(words)


@pytest.mark.parametrize(
    ("words", "threads", "code"),
    [
        (["--version"], 1, 0),
        (["pretrain", "--no.such", "1"], 1, 2),
        (["--version"], 2, 77),
        (["--version"], None, 77),
    ],
)
def test_exit_codes_and_the_new_interpreter_if_a_fork_is_not_safe(words: list[str], threads: int, code: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=run_in_child, args=(words, threads))
    process.start()
    process.join()
    assert process.exitcode == code


def test_a_run_can_be_stopped_and_has_the_sweeps_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_LION_TRIED", raising=False)
    run = warm_runs.WarmRun("--version", [], {**os.environ, "MEGATRON_LION_TRIED": "1"})
    assert "MEGATRON_LION_TRIED" not in os.environ, "only the server's environment is changed"
    code = run.wait()
    assert code == 0
    again = warm_runs.WarmRun("watch", ["/nothing"], dict(os.environ))
    again.terminate()
    assert again.wait() in (-signal.SIGTERM, 2, 4, 143), "stopped, or it found nothing to watch before"
