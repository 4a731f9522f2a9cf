"""The checks of an index in blocks: equal to checks of whole arrays, in less than a byte of memory a sequence."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from index_pairs import write_pair

from megatron_lion.data import index_arrays
from megatron_lion.data.bert_datasets import check_sentences
from megatron_lion.data.indexed_check import check_indexed
from megatron_lion.errors import DataError

SIZES = np.array([1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17])


def whole_fault(lengths: Any, pointers: Any, boundaries: Any, itemsize: int) -> str | None:
    """What is wrong with an index, from its whole arrays at once."""
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    elsewhere = np.flatnonzero(pointers != ends - lengths.astype(np.int64) * itemsize)
    if lengths.min() < 0:
        return f"sequence {int(lengths.argmin())} has length {lengths.min()}: damaged"
    if elsewhere.size:
        return f"sequence {elsewhere[0]} does not begin where the one before ends: damaged"
    rises = all(np.diff(boundaries) >= 0)
    if not rises or boundaries[0] != 0 or boundaries[-1] != len(lengths):
        return f"document boundaries do not run from 0 to {len(lengths)}: damaged"
    return None


def random_index(random: np.random.Generator) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], Any]:
    count = int(random.choice(SIZES))
    lengths = random.integers(0, 6, count).astype(np.int32)
    lengths[random.integers(count)] += 1
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    inner = np.sort(random.integers(0, count + 1, random.integers(0, 12)))
    return lengths, pointers, np.concatenate([[0], inner, [count]]).astype(np.int64)


def test_blocks_give_the_result_of_whole_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over indexes with up to two changes, at sizes around multiples of the block."""
    random = np.random.default_rng(5)
    found: dict[str, int] = {}
    for _ in range(300):
        monkeypatch.setattr(index_arrays, "BLOCK", int(random.choice([1, 2, 4, 8])))
        lengths, pointers, boundaries = random_index(random)
        tokens = int(lengths.sum())
        for array in random.permutation(3)[: random.integers(0, 3)]:
            changed = (lengths, pointers, boundaries)[array]
            changed[random.integers(changed.size)] += random.choice([-9, -1, 1, 2])
        expected = whole_fault(lengths, pointers, boundaries, 2)
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, lengths.size, boundaries.size)
        Path(tmp_path, "a.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
        Path(tmp_path, "a.bin").write_bytes(bytes(2 * tokens))
        if expected is None and lengths.sum() == tokens:
            assert check_indexed(tmp_path / "a").num_tokens == tokens
            found["intact"] = found.get("intact", 0) + 1
            assert check_indexed(tmp_path / "a", contents=False).num_tokens == tokens
            continue
        with pytest.raises(DataError) as error:
            check_indexed(tmp_path / "a")
        expected = expected or "truncated, or of another dataset"  # a valid index of other tokens
        assert expected in str(error.value)
        found[expected.split()[0]] = found.get(expected.split()[0], 0) + 1
    assert min(found[name] for name in ("intact", "sequence", "document")) > 20, found


def test_sentences_in_blocks_give_the_result_of_whole_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(6)
    refused = 0
    for _ in range(300):
        monkeypatch.setattr(index_arrays, "BLOCK", int(random.choice([1, 2, 4, 8])))
        count = int(random.choice(SIZES))
        lengths = random.choice([0, 3, 512, 513], count, p=[0.1, 0.3, 0.3, 0.3])
        lengths[random.integers(count)] += 1
        boundaries = [0, *np.sort(random.integers(0, count + 1, random.integers(0, 12))).tolist(), count]
        write_pair(tmp_path / "a", lengths.tolist(), boundaries)
        info = check_indexed(tmp_path / "a")
        begin, end = np.sort(random.random(2)) if random.random() < 0.8 else (0.0, 1.0)
        first, last = round(begin * info.num_documents), round(end * info.num_documents)
        documents = [lengths[boundaries[i] : boundaries[i + 1]].tolist() for i in range(first, last)]
        if any(len(document) >= 2 and max(document) <= 512 for document in documents):
            check_sentences(info, begin, end)
            continue
        refused += 1
        single = sum(len(document) == 1 for document in documents)
        long = sum(max(document, default=0) > 512 for document in documents)
        with pytest.raises(DataError, match=f"documents {first} to {last} .*: {single} have one .*, {long} have a sen"):
            check_sentences(info, begin, end)
    assert 50 < refused < 250


def big_pair(prefix: Path, sentences: int) -> None:
    """Writes a pair of 2 tokens a sentence and 12 sentences a document, of which none can be used."""
    lengths = np.full(sentences, 2, "<i4")
    lengths[::12] = 600
    ends = np.cumsum(lengths, dtype=np.int64)
    boundaries = np.append(np.arange(0, sentences, 12), sentences)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sentences, boundaries.size))
        for array in (lengths, 2 * (ends - lengths), boundaries.astype("<i8")):
            array.tofile(stream)
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * int(ends[-1]))  # sparse


def test_memory_does_not_grow_with_the_sentences(tmp_path: Path) -> None:
    """For 2 million sentences: less than a byte each beyond the arrays of one block (5.6 copies of 8 bytes an entry)."""
    sentences = 2_000_000
    big_pair(tmp_path / "a", sentences)
    tracemalloc.start()
    try:
        info = check_indexed(tmp_path / "a")
        with pytest.raises(DataError, match="166667 have a sentence of more than 512"):
            check_sentences(info, 0.0, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert info.num_sequences == sentences
    assert peak < sentences + 48 * 2**18


def test_a_file_that_gets_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    big_pair(tmp_path / "a", 1000)
    with open(tmp_path / "a.idx", "r+b") as stream:
        arrays = index_arrays.IndexArrays(stream.fileno(), 1000, 85)
        assert arrays.lengths(998, 1000).tolist() == [2, 2]
        stream.truncate(2000)
        with pytest.raises(OSError, match="cut short while it was read"):
            arrays.lengths(0, 1000)
