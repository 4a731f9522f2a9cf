"""Files of ours: whole or not there, never through a link, no leftovers, and a StorageError for what the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_lion.errors import StorageError
from megatron_lion.files import append_line, remove_leftovers, storage_errors, write_whole
from megatron_lion.logs import log_file
from megatron_lion.runs.metrics import MetricsWriter

WRITERS: dict[str, Callable[[Path], Any]] = {
    ".it.json.tmp": lambda path: write_whole(path.with_name("it.json"), b"new"),
    "metrics.jsonl": lambda path: append_line(path, "{}"),
    "log/rank00000.log": lambda path: log_something(path),
}
"""Functions that write the file of their key."""


def log_something(path: Path) -> None:
    with log_file(path):
        logging.getLogger("megatron_lion.test").warning("something")


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    """A run folder from elsewhere may have a link in place of a file."""
    path, victim, missing = tmp_path / "run" / name, tmp_path / "thesis.tex", tmp_path / "missing"
    path.parent.mkdir(parents=True)
    victim.write_text("irreplaceable")
    for target in (victim, missing):
        path.symlink_to(target)
        with pytest.raises(StorageError, match=rf"{name}: cannot be written: it is a symbolic link.*remove the link"):
            WRITERS[name](path)
        path.unlink()
    assert victim.read_text() == "irreplaceable"
    assert not missing.exists()


def test_a_metrics_file_that_is_a_link_is_refused_before_it_is_repaired(tmp_path: Path) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("no line of metrics")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written: it is a symbolic link"):
        MetricsWriter(tmp_path, tiny.tiny_config(tmp_path, "no-corpus"), is_main=True)
    assert victim.read_text() == "no line of metrics"


def test_a_limit_on_file_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (60_000, 60_000))
    with (
        pytest.raises(StorageError, match=r"may write 60,000 bytes to a file: raise that limit \(ulimit -f\)"),
        storage_errors("it"),
    ):
        raise OSError(errno.EFBIG, "File too large")


def test_a_link_in_place_of_the_result_is_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("irreplaceable")
    (tmp_path / "it.json").symlink_to(victim)
    write_whole(tmp_path / "it.json", b"new")
    assert (tmp_path / "it.json").read_bytes() == b"new"
    assert not (tmp_path / "it.json").is_symlink()
    assert victim.read_text() == "irreplaceable"


def test_a_second_name_of_a_file_is_not_emptied(tmp_path: Path) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("irreplaceable")
    os.link(victim, tmp_path / ".it.json.tmp")
    write_whole(tmp_path / "it.json", b"new")
    assert victim.read_text() == "irreplaceable"
    assert (tmp_path / "it.json").read_bytes() == b"new"


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    """Opening it would wait for its reader for ever."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(StorageError, match=f"{name}: cannot be written"):
        WRITERS[name](path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # now it could be opened for writing, and it still is no file
    with pytest.raises(StorageError, match=f"{name}: cannot be written: Not a regular file"):
        WRITERS[name](path)
    os.close(reader)


def test_what_a_killed_writer_left_is_used_again(tmp_path: Path) -> None:
    (tmp_path / ".it.json.tmp").write_text("half of a longer text")
    write_whole(tmp_path / "it.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("it.json", b"new")]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    """The first one is at work: it holds its temporary file, and goes on after the second one is done."""
    with open(tmp_path / ".it.json.tmp", "wb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        first.write(b"first")
        write_whole(tmp_path / "it.json", b"second")
        assert (tmp_path / "it.json").read_bytes() == b"second"
        first.flush()
        os.replace(tmp_path / ".it.json.tmp", tmp_path / "it.json")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("it.json", b"first")]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = [".run.json.tmp", ".run.json.tmp-77-0a1b2c", ".tokenizer.tmp/vocab.json"]
    kept = ["run.json", "old.tmp", ".cache", ".notes.tmp.txt", "step_0000001.tmp-1-aaaaaa/x", ".run.json.tmp-mine"]
    for name in (*gone, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / ".cache")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name.split("/")[0] for name in kept)
    remove_leftovers(tmp_path / "missing")


def test_a_line_is_written_whole_by_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:3]))
    append_line(tmp_path / "lines", '{"step": 1}')
    append_line(tmp_path / "lines", '{"step": 2}')
    monkeypatch.undo()
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "ftruncate"])
def test_a_file_is_old_or_new_after_any_failure(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.json"
    write_whole(path, b"old")

    def refuse(*words: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(
        StorageError, match=rf"it.json: cannot be written: {os.strerror(number)}; .*same command again$"
    ):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("it.json", b"new")]
