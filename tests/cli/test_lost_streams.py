"""A closed, full or abandoned stdout or stderr ends no training, and makes no failure look like a success."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.configfile import dump_config

REPO = Path(__file__).resolve().parents[2]


def abandoned() -> int:
    """A descriptor of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def point(descriptor: int, where: str) -> None:
    """Makes this process's stdout or stderr a missing, abandoned or full one, or a file, as a shell and Python do."""
    name = {1: "stdout", 2: "stderr"}[descriptor]
    if where == "closed":
        os.close(descriptor)
        setattr(sys, name, None)
        return
    opened = abandoned() if where == "abandoned" else os.open(where, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, descriptor)
    setattr(sys, name, open(descriptor, "w", buffering=1 if descriptor == 2 else -1, closefd=False))  # noqa: SIM115 - for the process's life


def _job(words: list[str], stdout: str, stderr: str, exits: str) -> None:
    if exits:
        os.environ.update(RANK="0", MEGATRON_LION_EXIT_DIR=exits)
    point(1, stdout)
    point(2, stderr)
    sys.argv[1:] = words
    with contextlib.suppress(KeyboardInterrupt):
        from megatron_lion.cli import entry

        entry()


def code_of(words: list[str], stdout: str = os.devnull, stderr: str = os.devnull, exits: str = "") -> int | None:
    """Runs `megatron-lion WORDS` in a process forked from the warm one, and returns its exit code."""
    process = multiprocessing.get_context("forkserver").Process(target=_job, args=(words, stdout, stderr, exits))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    corpus = tiny.write_corpus(folder / "corpus")
    config = tiny.tiny_config(folder / "finished", corpus, train__steps=4, checkpoint__every=2, log__progress=True)
    run_distributed(tiny.train_each, 1, {"": config})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "finished"


def job(finished: Path, run: Path, *words: str) -> list[str]:
    """A copy of the run whose newest checkpoint is gone, and the command that trains its last steps again."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_0000004")
    return ["pretrain", "--config", str(finished.parent / "config.yaml"), "--run_dir", str(run), "--fall-back", *words]


def has_trained(run: Path) -> bool:
    return (run / "checkpoints" / "step_0000004" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("abandoned", "both"),
        ("abandoned", "stderr"),
        ("closed", "both"),
        ("/dev/full", "both"),
        ("/dev/full", "stdout"),
    ],
)
def test_a_lost_stream_ends_no_training(where: str, name: str, finished: Path, tmp_path: Path) -> None:
    """The resume prints a warning, a summary and progress to stderr, and one line to stdout."""
    words = job(finished, tmp_path / "run")
    lost = {"stdout": where, "stderr": where} if name == "both" else {name: where}
    errors = tmp_path / "err"
    assert code_of(words, **{"stderr": str(errors), **lost}) == 0
    assert has_trained(tmp_path / "run")
    if name == "stdout":
        text = errors.read_text()
        assert "Traceback" not in text
        assert text.count("stdout did not take its last lines: No space left on device\n") == (where == "/dev/full")


@pytest.mark.parametrize("where", ["abandoned", "closed"])
def test_an_error_that_nobody_can_read_keeps_its_code(where: str, finished: Path, tmp_path: Path) -> None:
    """A rank also leaves its exit file."""
    exits = tmp_path / "exits"
    exits.mkdir()
    words = job(finished, tmp_path / "run", "--optimizer.lr", "-1")
    assert code_of(words, stderr=where, stdout=where, exits=str(exits)) == 2
    assert json.loads((exits / "exit.0.json").read_text())["exit_code"] == 2


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `ml` is the command."""
    words = f'ml() {{ "{sys.executable}" -m megatron_lion "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", words], cwd=REPO, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("ml --version > /dev/full", 5, "megatron-lion: stdout: No space left on device"),
        ("ml toy --help > /dev/full", 5, "megatron-lion: stdout: No space left on device"),
        ("ml --help | true", 0, ""),
        ("ml --version >&-", 0, ""),
        ("ml nonsense 2> >(exec true)", 2, ""),
        ("ml nonsense 2>&-", 2, ""),
        ("ml nonsense 2> /dev/full", 2, ""),
        ("ml nonsense <&- >&- 2>&-", 2, ""),
    ],
)
def test_what_a_command_prints(line: str, code: int, words: str) -> None:
    """Output that is the command's result is not lost in silence; the end of a pipe's reader is no error."""
    ended = shell(line)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith(words)
    assert ended.stderr.count("\n") == (words != "")


def test_the_launcher_keeps_the_code_without_a_stderr(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megatron_lion.launcher", "--processes", "1", "nonsense"]
    for line in ('"$@" 2>&-', '"$@" 2> >(exec true)', '"$@" <&- >&- 2>&-'):
        ended = subprocess.run(["bash", "-c", line, "bash", *words], cwd=REPO, env={**os.environ, "TMPDIR": str(tmp_path)},
                               timeout=120)  # fmt: skip
        assert ended.returncode == 2, line


def test_every_line_to_stderr_is_written_by_say() -> None:
    """A program that uses the package has plain streams, and `say` tolerates these as well."""
    package = REPO / "megatron_lion"
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        # installation.py must run on a Python that cannot read streams.py, and writes one line before it ends.
        if path.name not in ("streams.py", "installation.py")
        and ("stderr.write" in path.read_text() or "file=sys.stderr)" in path.read_text())
    ]
    assert found == []
