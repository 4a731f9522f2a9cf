"""Folders put in place whole: a reader finds the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lion import folder_swap
from megatron_lion.errors import StorageError
from megatron_lion.folder_swap import put_back, replace_folder, work_folder


def put(final: Path, text: str) -> None:
    with work_folder(final) as folder:
        (folder / "weights").write_text(text)
        replace_folder(folder, final)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to put a folder in the place of another one."""
    if request.param == "two renames":
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)
    return str(request.param)


def test_old_or_new_is_there_and_nothing_else(swap: str, tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    for text in ("one", "two", "three"):
        put(final, text)
        assert (final / "weights").read_text() == text
        assert names(final.parent) == ["model"]
    with work_folder(final) as folder:
        (folder / "weights").write_text("four")  # an export that its check refuses
    assert (final / "weights").read_text() == "three"
    assert names(final.parent) == ["model"]


def test_the_exchange_is_tried(tmp_path: Path) -> None:
    """This machine has it; otherwise all tests here would be about the other way."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert folder_swap._exchange(tmp_path / "one", tmp_path / "other") == sys.platform.startswith("linux")
    assert names(tmp_path / "one") == (["other"] if sys.platform.startswith("linux") else ["one"])


def killed_at(number: int, final: Path) -> int:
    """Puts a folder in place in a process that is killed before its n-th rename, removal or creation; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [number]

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "ctypes.dlsym"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        put(final, "new")
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_kill_leaves_the_old_one_or_the_new_one(swap: str, tmp_path: Path) -> None:
    seen = set()
    for number in range(1, 50):
        final = tmp_path / str(number) / "model"
        put(final, "old")
        code = killed_at(number, final)
        if swap == "exchange":
            seen.add((final / "weights").read_text())
        with work_folder(final):  # as the next export begins
            assert (final / "weights").read_text() in ("old", "new"), number
        put(final, "next")
        assert (final / "weights").read_text() == "next"
        assert names(final.parent) == ["model"], number
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 3
    assert seen == ({"old", "new"} if swap == "exchange" else set())


def test_a_folder_in_use_is_not_removed(tmp_path: Path) -> None:
    with work_folder(tmp_path / "model") as first:
        with work_folder(tmp_path / "model") as second:
            assert first.is_dir()
            assert second != first
        assert first.is_dir()
    assert names(tmp_path) == []


def test_only_abandoned_folders_of_the_same_name_are_removed(tmp_path: Path) -> None:
    for name in (".model.tmp-1-aaaaaa", ".other.tmp-3-cccccc"):
        (tmp_path / name).mkdir()
    put(tmp_path / "model", "new")
    assert names(tmp_path) == [".other.tmp-3-cccccc", "model"]


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_folder_that_another_process_takes_for_abandoned_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process begins between the mkdir and the lock of this one."""
    original, calls = {"before it is opened": os.open, "before it is locked": fcntl.flock}, 0
    others: list[Any] = []

    def other(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return real(*arguments)
        made = next(tmp_path.iterdir())
        if moment == "while it is locked":
            others.append(folder_swap._lock(made))
            others[0].__enter__()
        else:
            made.rmdir()
        return real(*arguments)

    real = original.get(moment, os.open)
    monkeypatch.setattr(*((fcntl, "flock") if moment == "before it is locked" else (os, "open")), other)
    with work_folder(tmp_path / "model") as folder:
        assert folder.is_dir()
        (folder / "weights").write_text("whole")
        replace_folder(folder, tmp_path / "model")
    assert calls >= 2, "it was made again"
    assert (tmp_path / "model" / "weights").read_text() == "whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_rename_that_fails_keeps_the_old_one(
    swap: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "model"
    put(final, "old")
    real = os.rename

    def refuse(one: Any, other: Any) -> None:
        if Path(one).name.startswith(".model.tmp"):
            raise OSError(number, os.strerror(number), str(one))
        real(one, other)

    if swap == "exchange":
        monkeypatch.setattr(folder_swap, "_exchange", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match=os.strerror(number)):
        put(final, "new")
    assert (final / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a folder", "empty folder"])
def test_what_is_no_folder_is_replaced_too(kind: str, swap: str, tmp_path: Path) -> None:
    final, elsewhere = tmp_path / "here" / "model", tmp_path / "elsewhere"
    final.parent.mkdir()
    elsewhere.mkdir()
    if kind == "file":
        final.write_text("no folder")
    elif kind == "empty folder":
        final.mkdir()
    else:
        final.symlink_to(elsewhere if kind == "link to a folder" else "nowhere")
    put(final, "new")
    assert not final.is_symlink()
    assert (final / "weights").read_text() == "new"
    assert (names(final.parent), names(elsewhere)) == (["model"], [])


def test_what_a_kill_after_both_renames_left_is_removed(tmp_path: Path) -> None:
    for name in ("model", ".model.old"):
        (tmp_path / name).mkdir()
    assert not put_back(tmp_path / "model")
    assert names(tmp_path) == ["model"]
