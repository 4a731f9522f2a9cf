"""What is remembered of a plain token file: used while the file is the same, and only then."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_pairs import write_pair

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data import indexed_check, token_memory
from megatron_lion.data.corpora import open_corpora

MODEL = ModelConfig(seq_length=8, vocab_size=300, make_vocab_size_divisible_by=4)
LENGTHS = [30] * 20


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The token files that were read whole; small files and new ones are remembered, too."""
    found: list[Path] = []
    plain = indexed_check._read_content

    def counted(path: Path, dtype: Any, size: int) -> Any:
        found.append(path)
        return plain(path, dtype, size)

    monkeypatch.setattr(indexed_check, "_read_content", counted)
    monkeypatch.setattr(token_memory, "_BLOCKS", 4)
    monkeypatch.setattr(token_memory, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(token_memory, "_SETTLED_S", -3600.0)
    return found


def write(prefix: Path, seed: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, 300, sum(LENGTHS))
    write_pair(prefix, LENGTHS, list(range(21)), tokens)
    return tokens


def content_of(prefix: Path, cache: Path) -> tuple[str, int, int]:
    """Opens a prefix as a start does."""
    found = open_corpora(DataConfig(path=[str(prefix)], split="100,0,0"), MODEL, cache=cache)
    return dataclasses.astuple(found.infos[prefix].content)


def expected_of(prefix: Path) -> tuple[str, int, int]:
    data = Path(f"{prefix}.bin").read_bytes()
    tokens = np.frombuffer(data, "<u2")
    return hashlib.sha256(data).hexdigest(), int(tokens.min()), int(tokens.max())


def test_a_token_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    prefix, cache = tmp_path / "a", tmp_path / "cache"
    write(prefix, 1)
    first = content_of(prefix, cache)
    assert first == expected_of(prefix)
    assert len(reads) == 1
    assert [content_of(prefix, cache), content_of(prefix, cache)] == [first, first]
    assert len(reads) == 1
    without = open_corpora(DataConfig(path=[str(prefix)], split="100,0,0"), MODEL)
    assert without.digest == open_corpora(DataConfig(path=[str(prefix)], split="100,0,0"), MODEL, cache=cache).digest
    assert len(reads) == 2  # without a cache


def edit_in_place(prefix: Path) -> None:
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(40)
        stream.write(b"\1\0")


def replace_by_a_copy(prefix: Path) -> None:
    write(other := prefix.with_name("other"), 2)
    shutil.copy2(f"{other}.bin", f"{prefix}.new")
    os.replace(f"{prefix}.new", f"{prefix}.bin")


def copy_over(prefix: Path) -> None:
    write(other := prefix.with_name("other"), 2)
    shutil.copy2(f"{other}.bin", f"{prefix}.bin")


def other_documents(prefix: Path) -> None:
    write_pair(prefix.with_name("b"), [60] * 10, list(range(11)))
    os.replace(f"{prefix.with_name('b')}.idx", f"{prefix}.idx")


@pytest.mark.parametrize("change", [edit_in_place, replace_by_a_copy, copy_over, other_documents])
def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[Path], change: Callable[[Path], None]) -> None:
    """Its size and its time of change are as before."""
    prefix, cache = tmp_path / "a", tmp_path / "cache"
    write(prefix, 1)
    content_of(prefix, cache)
    before = os.stat(f"{prefix}.bin")
    time.sleep(0.02)  # longer than the resolution of the file system's times
    change(prefix)
    if change is not other_documents:
        os.utime(f"{prefix}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(f"{prefix}.bin")
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert content_of(prefix, cache) == expected_of(prefix)
    assert len(reads) == 2
    content_of(prefix, cache)
    assert len(reads) == 2


def test_another_text_differs_in_the_sample_even_if_the_file_system_reports_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, cache = tmp_path / "a", tmp_path / "cache"
    write(prefix, 1)
    same = os.stat(f"{prefix}.bin")
    monkeypatch.setattr(token_memory, "os", Frozen(same))
    first = content_of(prefix, cache)
    write(prefix, 2)
    assert content_of(prefix, cache) == expected_of(prefix) != first
    for place in (0, sum(LENGTHS) - 1):  # the first and the last token are in the sample
        tokens = np.fromfile(f"{prefix}.bin", "<u2")
        tokens[place] = 299 - tokens[place]
        tokens.tofile(f"{prefix}.bin")
        assert content_of(prefix, cache) == expected_of(prefix)


class Frozen:
    """The module os for a file system that reports the same facts of a file for ever."""

    def __init__(self, facts: os.stat_result) -> None:
        self.facts = facts

    def fstat(self, descriptor: int) -> os.stat_result:
        return self.facts

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "folder", "of another file", "not listed"])
def test_a_damaged_memory_is_ignored(tmp_path: Path, reads: list[Path], damage: str) -> None:
    prefix, cache = tmp_path / "a", tmp_path / "cache"
    write(prefix, 1)
    write(tmp_path / "b", 2)
    content_of(tmp_path / "b", cache)
    (other,) = cache.iterdir()
    content_of(prefix, cache)
    (memory,) = set(cache.iterdir()) - {other}
    whole, again = memory.read_bytes(), len(reads)
    for place in range(0, len(whole), 23) if damage == "flipped" else [0]:
        if damage == "flipped" and chr(whole[place]).isspace():
            continue  # white space means nothing
        changed = bytearray(whole)
        changed[place] ^= 1
        parts = {"flipped": bytes(changed), "cut": whole[:-30], "empty": b"", "of another file": other.read_bytes()}
        if damage == "folder":
            memory.unlink()
            memory.mkdir()
        elif damage == "not listed":
            memory.write_text(json.dumps({"format": 1}))
        else:
            memory.write_bytes(parts[damage])
        assert content_of(prefix, cache) == expected_of(prefix), place
        again += 1
        assert len(reads) == again, (place, bytes(changed))
    if damage != "folder":
        assert content_of(prefix, cache) == expected_of(prefix)
        assert len(reads) == again


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next change may come within the resolution of the file system's times."""
    monkeypatch.setattr(token_memory, "_SETTLED_S", 60.0)
    write(tmp_path / "a", 1)
    content_of(tmp_path / "a", tmp_path / "cache")
    content_of(tmp_path / "a", tmp_path / "cache")
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path: Path, reads: list[Path]) -> None:
    write(tmp_path / "a", 1)
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        assert content_of(tmp_path / "a", tmp_path / "cache") == expected_of(tmp_path / "a")
    assert len(reads) == 2
