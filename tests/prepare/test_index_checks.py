"""Indexes that no writer makes: boundaries out of order, files beyond 2 GiB, surplus bytes, negative ids."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from index_pairs import index_bytes, write_pair

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data import indexed_check
from megatron_lion.data.batches import micro_batches
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.data.hashed_file import HashedFile
from megatron_lion.data.indexed_writer import IndexedWriter, check_indexed
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.parallel import Ranks

MODEL = ModelConfig(seq_length=8, vocab_size=300, make_vocab_size_divisible_by=4)


@pytest.mark.parametrize(
    "boundaries",
    [[0, 3, 2, 4], [0, -1, 4], [0, 5, 4], [1, 2, 4], [-1, 2, 4], [0, 2, 3], [0, 2, 5], [4, 2, 0], [0, 2**40, 4]],
)
def test_document_boundaries_out_of_order_are_refused(tmp_path: Path, boundaries: list[int]) -> None:
    write_pair(tmp_path / "a", [3, 1, 2, 5], boundaries)
    message = (
        r"a\.idx: document boundaries do not run from 0 to 4: damaged; copy it again, or make it again with the tool"
    )
    with pytest.raises(DataError, match=message):
        check_indexed(tmp_path / "a")


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 2, 3, 4], [0, 0, 2, 2, 2, 4, 4]])
def test_ascending_boundaries_and_empty_documents_are_accepted(tmp_path: Path, boundaries: list[int]) -> None:
    write_pair(tmp_path / "a", [3, 1, 2, 5], boundaries)
    info = check_indexed(tmp_path / "a")
    assert (info.num_documents, info.num_sequences, info.num_tokens) == (len(boundaries) - 1, 4, 11)


def test_a_negative_length_is_refused(tmp_path: Path) -> None:
    """The pointers agree with the lengths, and the sum fits the tokens."""
    write_pair(tmp_path / "a", [3, -1, 9], [0, 1, 2, 3])
    with pytest.raises(DataError, match=r"a\.idx: sequence 1 has length -1: damaged"):
        check_indexed(tmp_path / "a")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_pointer_elsewhere_is_refused(tmp_path: Path, at: int) -> None:
    write_pair(tmp_path / "a", [3, 1, 9], [0, 1, 2, 3])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34 + 4 * 3 + 8 * at] ^= 2
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.idx: sequence {at} does not begin where the one before ends"):
        check_indexed(tmp_path / "a")


@pytest.mark.parametrize(("sequences", "boundaries"), [(0, 1), (0, 2), (1, 1), (1, 0)])
def test_an_index_without_documents_is_refused(tmp_path: Path, sequences: int, boundaries: int) -> None:
    write_pair(tmp_path / "a", [2] * sequences, [0] * boundaries)
    with pytest.raises(DataError, match=r"a\.idx: holds no documents"):
        check_indexed(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_tokens_beyond_2_and_4_gib(tmp_path: Path, dtype: str) -> None:
    """Offsets beyond 32 bits, in a sparse file; megatron-core reads its last tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lengths = [2**30, 2**30 + 1, 2**30, 3]
    size = np.dtype(dtype).itemsize
    write_pair(tmp_path / "a", [3], [0, 1], [7, 8, 9], dtype)
    with open(tmp_path / "a.bin", "r+b") as stream:
        tail = stream.read()
        stream.truncate(0)
        stream.truncate(size * (sum(lengths) - 3))
        stream.seek(0, os.SEEK_END)
        stream.write(tail)
    (tmp_path / "a.idx").write_bytes(index_bytes(lengths, [0, 1, 4], dtype))
    info = check_indexed(tmp_path / "a")
    assert (info.num_documents, info.num_sequences, info.num_tokens) == (2, 4, 3 * 2**30 + 4)
    assert info.bin_bytes == size * (3 * 2**30 + 4) > 2**32
    reader = IndexedDataset(str(tmp_path / "a"))  # it returns views of its memory map
    assert reader[3].tolist() == [7, 8, 9]
    del reader
    os.truncate(tmp_path / "a.bin", info.bin_bytes - 2**32)  # a 32-bit size would accept this file as the same
    with pytest.raises(DataError, match=rf"a\.bin: {info.bin_bytes - 2**32} bytes, .* = {info.bin_bytes}: truncated"):
        check_indexed(tmp_path / "a")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (70_000, "<i4")])
def test_the_writer_points_beyond_4_gib(
    tmp_path: Path, vocab_size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.array([2**30, 2**30 + 1, 2**30, 3])
    # The file has holes instead of tokens, which are one number in memory.
    monkeypatch.setattr(HashedFile, "write", lambda self, make, size: self._stream.truncate(size))
    with IndexedWriter(tmp_path / "a", vocab_size) as writer:
        writer.add_documents([np.broadcast_to(np.zeros(1, dtype), lengths.sum())], lengths, np.array([1, 3]))
        info = writer.finalize()
    assert info.num_tokens == sum(lengths)
    assert (tmp_path / "a.idx").read_bytes() == index_bytes(lengths.tolist(), [0, 1, 4], dtype)


@pytest.mark.parametrize("surplus", [1, 2, 2**32])
def test_more_tokens_than_the_index_describes(tmp_path: Path, surplus: int) -> None:
    write_pair(tmp_path / "a", [3, 1], [0, 1, 2])
    os.truncate(tmp_path / "a.bin", 8 + surplus)
    message = rf"a\.bin: {8 + surplus} bytes, but a\.idx describes 4 tokens of 2 bytes = 8: .* of another dataset"
    with pytest.raises(DataError, match=message):
        check_indexed(tmp_path / "a")


def test_smallest_and_largest_id_over_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_check, "_SCAN_TOKENS", 4)
    for tokens in ([1, 2, 3, 4, 5, 299, 7, 8, 9], [9, 9, 9, 9, 9, 9, 9, 9, 1], [-5, 1, 1, 1, 1]):
        write_pair(tmp_path / "a", [len(tokens)], [0, 1], tokens, "<i4")
        info = check_indexed(tmp_path / "a")
        assert info.token_range == (min(tokens), max(tokens))
        assert info.max_token == max(tokens)


def test_negative_ids_are_refused_when_the_data_is_opened(tmp_path: Path) -> None:
    tokens = [5, 6, 7, -1, 8, 9]
    write_pair(tmp_path / "a", [3, 3], [0, 1, 2], tokens, "<i4")
    with pytest.raises(DataError, match=r"a\.bin holds token id -1, ids begin at 0: the file is damaged"):
        open_corpora(DataConfig(path=[str(tmp_path / "a")]), MODEL)
    write_pair(tmp_path / "a", [3, 3], [0, 1, 2], np.abs(tokens), "<i4")
    assert open_corpora(DataConfig(path=[str(tmp_path / "a")]), MODEL).vocab_size == 300


def test_negative_ids_are_refused_before_a_step_reads_them(tmp_path: Path) -> None:
    """The tokens are damaged after opening; those of a prepared folder are not scanned when it is opened."""
    tokens = np.arange(1, 201)
    write_pair(tmp_path / "a", [20] * 10, list(range(11)), tokens, "<i4")
    corpora = open_corpora(DataConfig(path=[str(tmp_path / "a")], split="100,0,0"), MODEL)
    write_pair(tmp_path / "a", [20] * 10, list(range(11)), -tokens, "<i4")
    dataset = build_datasets(corpora, MODEL, (8, 0, 0), seed=1, cache=tmp_path / "cache")[0]
    batches = micro_batches(
        dataset, start=0, end=8, global_batch_size=8, micro_batch_size=8, ranks=Ranks(0, 1, 0, 1, 0, 1, 0, 1),
        device=Device("cpu", 0, "gloo"), vocab_size=300,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"token id -\d+, the vocabulary has 300: a \.bin file is damaged"):
        next(batches)


def test_a_part_of_empty_documents_is_too_little_data(tmp_path: Path) -> None:
    """For such a part Megatron would loop without end. Only the first half of the documents has tokens."""
    write_pair(tmp_path / "a", [9, 9, 0, 0], [0, 1, 2, 3, 4])
    for split, begin in (("50,50,0", 50), ("0,50,50", 50)):
        corpora = open_corpora(DataConfig(path=[str(tmp_path / "a")], split=split), MODEL)
        with pytest.raises(DataError, match=rf"too little data: none of its 4 documents is in the part from {begin}"):
            build_datasets(corpora, MODEL, (1, 1, 0), seed=1, cache=tmp_path / "cache")


def test_a_pair_without_a_token_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [0, 0, 0], [0, 1, 2, 3])
    with pytest.raises(DataError, match=r"a\.idx: contains no tokens, only empty sequences \(3\)"):
        open_corpora(DataConfig(path=[str(tmp_path / "a")], split="100,0,0"), MODEL)


@pytest.mark.parametrize("vocab_size", [1, 256, 65_499, 65_500, 65_501, 65_536, 250_000])
def test_token_dtype_is_megatrons(vocab_size):
    """Token files for a vocabulary have the dtype that Megatron's own tools choose for it."""
    from megatron.core.datasets.indexed_dataset import DType

    assert indexed_check.token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
