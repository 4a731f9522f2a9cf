"""prepare under faults (killed processes, a full disk, an interrupt): no partial result, and the rerun resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from byte_bpe import write_byte_bpe

from megatron_lion.data.manifest import read_manifest
from megatron_lion.prepare.workfolder import work_folder

DOCUMENTS = 1500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a corpus of several pieces, which take some seconds to encode on one core."""
    folder = tmp_path_factory.mktemp("corpus")
    write_byte_bpe(folder, "w o", "r d", "wo rd")
    with open(folder / "a.jsonl", "w", encoding="ascii") as stream:
        for i in range(DOCUMENTS):
            text = " ".join(f"word{(i * j) % 9973}x{j}" for j in range(200))
            stream.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    return folder


def command(corpus: Path, output: Path, *more: str) -> list[str]:
    words = [
        "--input",
        str(corpus / "a.jsonl"),
        "--tokenizer",
        str(corpus),
        "--output",
        str(output),
        "--split",
        "8,1,1",
    ]
    return [
        sys.executable,
        "-m",
        "megatron_lion",
        "prepare",
        *words,
        "--encoder",
        "tokenizers",
        "--workers",
        "2",
        *more,
    ]


def finish(corpus: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(corpus, output, *more), capture_output=True, text=True, check=False, timeout=120)


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*_text_document.*")}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("twin") / "out"
    made = finish(corpus, output)
    assert made.returncode == 0, made.stderr
    assert "documents" in made.stdout
    assert "MB/s" in made.stderr
    return hashes(output)


def start_and_wait_for_shards(corpus: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """Starts prepare and returns when its first shards are on the disk, long before its last.

    It runs at the lowest priority; otherwise, on a busy machine, it could end before this process checks again.
    """
    process = subprocess.Popen(
        ["nice", "-n", "19", *command(corpus, output, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(work_folder(output).glob("shards-*/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_killed_worker_is_named_and_the_rerun_is_byte_identical(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    process = start_and_wait_for_shards(corpus, tmp_path / "out")
    workers_of(process)[0].kill()
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 8
    assert time.monotonic() - began < 10
    assert "a worker process of prepare was killed" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    again = finish(corpus, tmp_path / "out")
    assert "from an earlier run" in again.stderr
    assert hashes(tmp_path / "out") == undisturbed
    assert not work_folder(tmp_path / "out").exists()


def test_killed_parent_leaves_no_workers_and_resumes(corpus: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = start_and_wait_for_shards(corpus, tmp_path / "out")
    workers = workers_of(process)
    assert workers
    process.kill()
    process.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert finish(corpus, tmp_path / "out").returncode == 0
    assert hashes(tmp_path / "out") == undisturbed


def test_interrupt_stops_at_once_and_resumes(corpus: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = start_and_wait_for_shards(corpus, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # to parent and workers, as a terminal does
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert "run the same command again" in said.splitlines()[-1]
    assert finish(corpus, tmp_path / "out").returncode == 0
    assert hashes(tmp_path / "out") == undisturbed


def test_workers_are_deaf_to_interrupts_from_their_first_moment(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """A terminal's interrupt reaches workers too, and would end one that is still importing with a traceback."""
    process = subprocess.Popen(command(corpus, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workers := workers_of(process)):  # from here they import for some tenths of a second
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert hashes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("limit_bytes", [20_000, 1_000_000])
def test_full_disk_leaves_nothing_that_looks_whole(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], limit_bytes: int
) -> None:
    # No file may grow beyond the limit: the smaller one stops a worker's shard, the larger one the merged file.
    limited = ["prlimit", f"--fsize={limit_bytes}", *command(corpus, tmp_path / "out")]
    stopped = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert stopped.returncode == 5, stopped.stderr
    assert (
        f"File too large; this process may write {limit_bytes:,} bytes to a file: raise that limit"
        in stopped.stderr.splitlines()[-1]
    )
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out").exists()
    assert finish(corpus, tmp_path / "out").returncode == 0
    assert hashes(tmp_path / "out") == undisturbed
    assert read_manifest(tmp_path / "out").documents == DOCUMENTS


# Dies before or after the call that gives the new folder its name, or between the two renames that do it.
KILLED_WHILE_REPLACING = """
import os, signal, sys
from megatron_lion import folder_swap
from megatron_lion.cli import main

moment = sys.argv.pop(1)
exchange, rename = folder_swap._exchange, os.rename

def die(*names):
    os.kill(os.getpid(), signal.SIGKILL)

def exchange_and_die(one, other):
    exchange(one, other)
    die()

def refuse(one, other):
    def rename_and_die(old, new):
        rename(old, new)
        die()
    os.rename = rename_and_die
    return False

folder_swap._exchange = {"before": die, "after": exchange_and_die, "between": refuse}[moment]
main()
"""


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "between", "after"])
def test_a_kill_while_an_output_is_replaced_loses_nothing(
    tmp_path: Path, undisturbed: dict[str, str], corpus: Path, moment: str
) -> None:
    output = tmp_path / "out"
    (tmp_path / "b.jsonl").write_text('{"text": "word"}\n{"text": "words"}\n{"text": "wo rd"}\n')
    words = ["--input", str(tmp_path / "b.jsonl"), "--workers", "1"]
    assert finish(corpus, output, *words).returncode == 0
    older = hashes(output)
    command_line = command(corpus, output, "--overwrite", "--seed", "7", *words)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_REPLACING, moment, *command_line[3:]],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert output.exists() == (moment != "between")
    if moment != "after":
        shutil.rmtree(work_folder(output))  # what docs/data.md names to give up a run
        # The same input and settings as the older dataset: it is there again, whole.
        again = finish(corpus, output, *words)
        assert again.returncode == 0, again.stderr
        assert "already complete" in again.stderr
        assert ("has its name again" in again.stderr) == (moment == "between")
        assert hashes(output) == older
    newer = finish(corpus, output, "--overwrite", "--seed", "7", *words)
    assert newer.returncode == 0, newer.stderr
    assert ("already complete" in newer.stderr) == (moment == "after")
    assert read_manifest(output).seed == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl", "out"]


def test_command_refuses_on_one_line_with_the_tables_code(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    cases = (
        (["--input", str(tmp_path / "bad.jsonl")], 3, "bad.jsonl:2: no key 'text' (its keys: 'txt')"),
        (["--input", str(tmp_path / "none.jsonl")], 3, "no such file or folder"),
        (["--tokenizer", str(tmp_path)], 3, "contains no tokenizer"),
        (["--split", "a,b"], 2, "split 'a,b'"),
        (["--output", str(tmp_path / "bad.jsonl")], 2, "is not a folder"),
        (["--output", "/proc/none/out"], 5, "cannot be made"),
    )
    for more, code, said in cases:
        ended = finish(corpus, tmp_path / "out", *more)
        assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
        assert said in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
    skipped = finish(corpus, tmp_path / "out", "--input", str(tmp_path / "bad.jsonl"), "--on-error", "skip")
    assert "rejected: 1 missing_key" in skipped.stdout


def test_a_worker_that_is_killed_while_it_starts(corpus: Path, tmp_path: Path) -> None:
    """Its arguments were larger than a pipe holds, so the parent waited without end for a reader."""
    letters = string.ascii_letters
    vocabulary = write_byte_bpe(tmp_path / "large", *(f"{first} {second}" for first in letters for second in letters))
    output = tmp_path / "out"
    words = command(corpus, output)
    words[words.index("--tokenizer") + 1] = str(vocabulary)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        parent, deadline = psutil.Process(process.pid), time.monotonic() + 100
        workers: list[psutil.Process] = []
        while not workers and time.monotonic() < deadline:
            workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()
        try:
            _, stderr = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 8, stderr
    assert "a worker process of prepare was killed" in stderr
    assert "Traceback" not in stderr
    assert finish(corpus, output).returncode == 0
