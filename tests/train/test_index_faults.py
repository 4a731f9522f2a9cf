"""Each fault of a folder of index files has a message of its own, and is found before a file of it is read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from index_samples import left_in, reported

from megatron_lion.data import index_cache
from megatron_lion.data.index_cache import LISTING, _verify_elsewhere, find_fault, index_folder
from megatron_lion.errors import StorageError
from megatron_lion.files import sha256_file

KEY = {"format": 1, "seed": 7}
DIGEST = "0" * 64
ARRAY = np.arange(5)


def build(folder: Path) -> list[Any]:
    (folder / "text").write_text("content")
    np.save(folder / "array.npy", ARRAY)
    return ["content", ARRAY]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return index_folder(tmp_path / "cache", DIGEST, {"seed": 7}, build)


def relist(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / LISTING).read_text())
    change(content)
    (folder / LISTING).write_text(json.dumps(content))


def linked(folder: Path) -> None:
    (folder / "text").rename(folder.parent.parent / "elsewhere")
    (folder / "text").symlink_to(folder.parent.parent / "elsewhere")


def a_file_instead(folder: Path) -> None:
    folder.rename(folder.parent.parent / "aside")
    folder.write_text("a file")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other key": (lambda f: relist(f, lambda c: c["key"].update(seed=8)), "they were built from other data or settings"),
    "other format": (lambda f: relist(f, lambda c: c["key"].update(format=0)), "they were built from other data or settings"),
    "no files": (lambda f: relist(f, lambda c: c.update(files={})), "index.json is damaged"),
    "no entry": (lambda f: relist(f, lambda c: c.pop("files")), "index.json is damaged"),
    "files as a list": (lambda f: relist(f, lambda c: c.update(files=[1])), "index.json is damaged"),
    "facts as a text": (lambda f: relist(f, lambda c: c["files"].update(text="x")), "index.json is damaged"),
    "no object": (lambda f: (f / LISTING).write_text("[]"), "index.json is damaged"),
    "no JSON": (lambda f: (f / LISTING).write_text("{"), "index.json is damaged"),
    "nested": (lambda f: (f / LISTING).write_text("[" * 100_000), "index.json is damaged"),
    "a path": (
        lambda f: relist(f, lambda c: c["files"].update({"x/text": c["files"].pop("text")})),
        "x/text is not a plain file of this folder",
    ),
    "a link": (linked, "text is not a plain file of this folder"),
    "cut": (lambda f: os.truncate(f / "text", 3), "text has 3 bytes, index.json lists 7"),
    "changed": (lambda f: (f / "text").write_text("kontent"), "the SHA-256 of text is not the one in index.json"),
    "no file": (lambda f: (f / "text").unlink(), "text is missing"),
    "no listing": (lambda f: (f / LISTING).unlink(), "index.json is missing"),
    "no folder": (a_file_instead, "index.json cannot be read: Not a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_and_repaired(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_fault(folder, KEY) is None
    FAULTS[name][0](folder)
    assert find_fault(folder, KEY) == FAULTS[name][1]
    assert index_folder(folder.parent, DIGEST, {"seed": 7}, build) == folder
    (line,) = reported(caplog)
    assert line.endswith(f"{folder}: these index files are not used: {FAULTS[name][1]}; building them again")
    assert find_fault(folder, KEY) is None
    assert (folder / "text").read_text() == "content"
    assert not left_in(folder.parent)


def test_without_contents_only_sizes_are_compared(folder: Path) -> None:
    (folder / "text").write_text("kontent")
    assert find_fault(folder, KEY, contents=False) is None
    (folder / "text").write_text("longer content")
    assert "text has 14 bytes" in str(find_fault(folder, KEY, contents=False))


@pytest.mark.parametrize(("number", "repaired"), [(errno.EIO, True), (errno.EACCES, False)])
def test_a_file_that_cannot_be_read(number: int, repaired: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector is damage, which a new file repairs; a file that may not be read is none."""

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(index_cache, "sha256_file", refuse)
    if repaired:
        assert find_fault(folder, KEY) in [
            f"{name} cannot be read: Input/output error" for name in ("text", "array.npy")
        ]
        return
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        find_fault(folder, KEY)


def test_another_rank_must_see_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = sha256_file(folder / LISTING)
    _verify_elsewhere(folder, KEY, listing, 1)
    with pytest.raises(
        StorageError, match=r"rank 1 on .* does not see .*\(its index.json differs\); set data.cache to a"
    ):
        _verify_elsewhere(folder, KEY, "0" * 64, 1)
    (folder / "text").write_text("kontent")  # of the same size: one rank of each node reads the contents
    monkeypatch.setenv("LOCAL_RANK", "1")
    _verify_elsewhere(folder, KEY, listing, 3)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(StorageError, match=r"rank 2 on .*\(the SHA-256 of text is not the one in index.json\)"):
        _verify_elsewhere(folder, KEY, listing, 2)


def test_another_rank_builds_nothing_and_compares(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 1 does with the digest that rank 0 sends."""
    sent = sha256_file(folder / LISTING)
    monkeypatch.setattr(index_cache, "dist", SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1))
    monkeypatch.setattr(index_cache, "agree", lambda what: nullcontext())
    monkeypatch.setattr(index_cache, "broadcast_object", lambda listing: sent)
    assert index_folder(folder.parent, DIGEST, {"seed": 7}, fail) == folder
    (folder / "text").write_text("kontent")
    with pytest.raises(StorageError, match="does not see the index files that rank 0 has checked there"):
        index_folder(folder.parent, DIGEST, {"seed": 7}, fail)


def fail(folder: Path) -> list[Any]:
    raise AssertionError("only rank 0 builds")


@pytest.mark.parametrize("change", ["text", "array", "more", "less"])
def test_files_that_differ_from_memory_are_not_kept(change: str, tmp_path: Path) -> None:
    def build_wrong(folder: Path) -> list[Any]:
        text, array = build(folder)
        return {"text": ["x", array], "array": [text, ARRAY + 1], "more": [text, array, "x"], "less": [text]}[change]

    with pytest.raises(StorageError, match="do not hold what was just written to them"):
        index_folder(tmp_path, DIGEST, {"seed": 7}, build_wrong)
    assert not left_in(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_build_left_is_removed(folder: Path) -> None:
    left = folder.with_name(f".{folder.name}.building")
    left.mkdir()
    (left / "old").write_text("old")
    (folder / "text").unlink()
    index_folder(folder.parent, DIGEST, {"seed": 7}, build)
    assert sorted(path.name for path in folder.iterdir()) == ["array.npy", LISTING, "text"]


def test_files_of_an_earlier_version_are_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    earlier = tmp_path / DIGEST[:16]
    index_folder(tmp_path, DIGEST, {"seed": 7}, build)
    assert reported(caplog) == []
    earlier.mkdir()
    np.save(earlier / "a.npy", ARRAY)
    index_folder(tmp_path, DIGEST, {"seed": 8}, build)
    assert reported(caplog) == [], "there are files of this version"
    other = tmp_path / ("1" * 16)
    other.mkdir()
    index_folder(tmp_path, "1" * 64, {"seed": 7}, build)
    assert reported(caplog) == [], "the folder holds no index files"
    (tmp_path / "b" / DIGEST[:16]).mkdir(parents=True)
    np.save(tmp_path / "b" / DIGEST[:16] / "a.npy", ARRAY)
    index_folder(tmp_path / "b", DIGEST, {"seed": 7}, build)
    (line,) = reported(caplog)
    assert f"{tmp_path / 'b'}: index files of an earlier version" in line
