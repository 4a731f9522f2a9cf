"""HashedFile writes the same bytes at every number of threads, and reports what fails in one of them."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.data import hashed_file
from megatron_lion.data.hashed_file import HashedFile
from megatron_lion.errors import DataError, StorageError


@examples(25)
@given(writes=st.lists(st.lists(st.binary(max_size=40), max_size=4), max_size=12), threads=st.integers(1, 4))
def test_content_and_hash_at_any_number_of_threads(
    tmp_path_factory: pytest.TempPathFactory, writes: list[list[bytes]], threads: int
) -> None:
    path = tmp_path_factory.mktemp("hashed") / "a"
    file = HashedFile(path, threads)
    for blocks in writes:
        file.write(lambda blocks=blocks: blocks, sum(map(len, blocks)))
    content = b"".join(block for blocks in writes for block in blocks)
    assert file.finish() == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content


def test_a_slow_block_is_hashed_before_later_ones(tmp_path: Path) -> None:
    later = threading.Event()

    def slow() -> list[bytes]:
        assert later.wait(60), "the second block is made while the first is awaited"
        return [b"first "]

    def second() -> list[bytes]:
        later.set()
        return [b"second"]

    file = HashedFile(tmp_path / "a", threads=3)
    file.write(slow, 6)
    file.write(second, 6)
    assert file.finish() == hashlib.sha256(b"first second").hexdigest()
    assert (tmp_path / "a").read_bytes() == b"first second"


def test_few_bytes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "_PENDING_BYTES", 100)
    made, most = [0], [0]
    file = HashedFile(tmp_path / "a", threads=2)
    written = 0

    def make() -> list[bytes]:
        made[0] += 40
        return [b"x" * 40]

    for _ in range(50):
        file.write(make, 40)
        written += 40
        most[0] = max(most[0], written - made[0])
    file.finish()
    assert most[0] <= 100 + 40


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_error_of_a_block_ends_the_file(tmp_path: Path, threads: int) -> None:
    def bad() -> list[bytes]:
        raise DataError("a bad block")

    file = HashedFile(tmp_path / "a", threads)

    def all_of_it() -> None:
        for number in range(20):
            file.write(bad if number == 3 else lambda: [b"x" * 10], 10)
        file.finish()

    with pytest.raises(DataError, match="a bad block"):
        all_of_it()
    file.discard()


def test_a_short_write_is_continued_and_a_full_disk_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: real(handle, bytes(data[:7]), place))
    file = HashedFile(tmp_path / "a", threads=3)
    file.write(lambda: [b"0123456789" * 3, b"abc"], 33)
    file.finish()
    assert (tmp_path / "a").read_bytes() == b"0123456789" * 3 + b"abc"

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    file = HashedFile(tmp_path / "b", threads=3)
    file.write(lambda: [b"abc"], 3)
    with pytest.raises(StorageError, match="make room"):
        file.finish()
    file.discard()
