"""Token files are byte-identical to those of Megatron-Core's builder, and opening them detects damage."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.data.indexed_writer import IndexedWriter, check_indexed, with_ending
from megatron_lion.data.manifest import (
    Manifest,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from megatron_lion.errors import DataError, StorageError

documents_of_ids = st.lists(st.lists(st.integers(0, 299), min_size=0, max_size=20), min_size=1, max_size=12)


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 300, threads: int = 1) -> None:
    with IndexedWriter(prefix, vocab_size, threads) as writer:
        runs = [np.array(document, dtype=np.int64) for document in documents]
        writer.add_documents(runs, np.array([len(document) for document in documents]))
        writer.finalize()


def make_manifest(prefix: Path) -> Manifest:
    info = check_indexed(prefix)
    split = SplitInfo(
        prefix=prefix.name, documents=info.num_documents, tokens=info.num_tokens, bin_bytes=info.bin_bytes,
        idx_bytes=info.idx_bytes, bin_sha256=info.bin_sha256, idx_sha256=info.idx_sha256,
    )  # fmt: skip
    return Manifest(
        version="0", encoder="none", kind="gpt", sources=(SourceInfo(path="x", bytes=1, sha256="0", documents=1),),
        tokenizer=TokenizerInfo(sha256="0", kind="BPE", vocab_size=300, eod_token=None, eod_id=None),
        dtype="uint16", split=(100.0, 0.0, 0.0), seed=0,
        documents=info.num_documents, tokens=info.num_tokens, text_bytes=1,
        duplicate_documents=0, skipped={}, rejected={}, splits={"train": split},
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@examples(15)
@given(documents=documents_of_ids)
def test_byte_identical_to_megatron_and_read_by_it(
    tmp_path_factory: pytest.TempPathFactory, vocab_size: int, documents: list[list[int]]
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents = [*documents, [7, vocab_size - 1]]
    folder = tmp_path_factory.mktemp("indexed")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    with IndexedWriter(folder / "ours", vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
            builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
        info = writer.finalize()
    builder.finalize(str(folder / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (folder / f"ours{ending}").read_bytes() == (folder / f"theirs{ending}").read_bytes()
    read = IndexedDataset(str(folder / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == documents
    assert (info.num_documents, info.num_tokens) == (len(documents), sum(map(len, documents)))
    assert info.max_token == vocab_size - 1
    for threads in (1, 3):
        write(folder / "at_once", documents, vocab_size, threads)
        assert (folder / "at_once.bin").read_bytes() == (folder / "ours.bin").read_bytes()
        assert (folder / "at_once.idx").read_bytes() == (folder / "ours.idx").read_bytes()


def test_sentences_and_empty_documents_as_megatron_writes_them(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedWriter(tmp_path / "ours", 300) as writer:
        for tokens, lengths in (([1, 2, 3, 4], [3, 1]), ([], []), ([5], [1])):
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), lengths)
            writer.add_document(np.array(tokens, dtype=np.int64), lengths)
        info = writer.finalize()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert (info.num_documents, info.num_sequences, info.num_tokens) == (3, 3, 5)


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    """OpenWebText has 380 million sentences."""
    peaks = []
    for blocks in (60, 300):
        tracemalloc.start()
        with IndexedWriter(tmp_path / f"{blocks}", 300) as writer:
            for _ in range(blocks):
                writer.add_documents([np.ones(10_000, np.uint16)], np.ones(10_000, np.int32))
            assert writer.finalize().num_documents == blocks * 10_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2e6


@pytest.mark.parametrize("threads", [1, 3])
def test_writer_refuses_what_does_not_fit(tmp_path: Path, threads: int) -> None:
    for bad in (300, -1):
        with pytest.raises(DataError, match="do not fit a vocabulary of 300"):
            write(tmp_path / "a", [[1], [2, bad]], threads=threads)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="holds no documents"), IndexedWriter(tmp_path / "a", 300) as writer:
        writer.finalize()
    with pytest.raises(StorageError, match="No such file or directory"):
        IndexedWriter(tmp_path / "none/a", 300)


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError), IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([1, 2, 300])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a", [[1, 2, 3]])

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(StorageError, match="make room"):
        write(tmp_path / "a", [[4, 5]])
    assert not (tmp_path / "a.idx").exists(), "an old index beside new tokens"


@pytest.mark.parametrize(
    ("ending", "change", "said"),
    [
        (".idx", lambda data: data[:20], "the header alone has 34"),
        (".idx", lambda data: data[:-1], "truncated or damaged"),
        (".idx", lambda data: data + b"\0", "truncated or damaged"),
        (".idx", lambda data: b"X" + data[1:], "does not begin with MMIDIDX"),
        (".idx", lambda data: data[:9] + b"\2" + data[10:], "index version 2"),
        (".idx", lambda data: data[:17] + b"\6" + data[18:], "dtype code 6"),
        (".idx", lambda data: data[:18] + b"\xff" * 8 + data[26:], "truncated or damaged"),
        (".bin", lambda data: data[: len(data) // 2], "truncated, or of another dataset"),
        (".bin", lambda data: b"", "truncated, or of another dataset"),
    ],
)
def test_damage_is_named_with_the_remedy(tmp_path: Path, ending: str, change, said: str) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    path = with_ending(tmp_path / "a", ending)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        check_indexed(tmp_path / "a.bin")
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "make it again with the tool that wrote it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int64", "int32"])
def test_integer_dtypes_of_other_tools_are_read(tmp_path: Path, name: str) -> None:
    """Megatron-Core's builder writes the files, with a dtype that does not depend on the vocabulary."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(name).type)
    for document in ([5, 6, 7], [], [100]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    info = check_indexed(tmp_path / "a")
    assert (info.dtype, info.num_documents, info.num_tokens, info.token_range) == (np.dtype(name), 3, 4, (5, 100))
    dataset = IndexedDataset(str(tmp_path / "a"))  # a reference is kept: its deletion unmaps the file under its arrays
    assert dataset[0].tolist() == [5, 6, 7]


def test_multimodal_and_empty_pairs_are_named(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), 1)
    builder.add_item(torch.tensor([3]), 0)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match="a mode for each sequence"):
        check_indexed(tmp_path / "a")
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([], dtype=torch.int64), [0])
    builder.finalize(str(tmp_path / "b.idx"))
    with pytest.raises(DataError, match=r"no tokens, only empty sequences \(1\)"):
        check_indexed(tmp_path / "b")


def test_missing_and_swapped_files(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    (tmp_path / "a.bin").rename(tmp_path / "x")
    with pytest.raises(DataError, match=r"a\.bin: no such file"):
        check_indexed(tmp_path / "a")
    (tmp_path / "a.idx").rename(tmp_path / "a.bin")
    (tmp_path / "x").rename(tmp_path / "a.idx")
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes() * 10)
    with pytest.raises(DataError, match="the two are swapped"):
        check_indexed(tmp_path / "a", rebuild="do this")
    with pytest.raises(DataError, match="do this"):
        check_indexed(tmp_path / "a", rebuild="do this")


@examples(300)
@given(data=st.data())
def test_no_flip_in_the_index_passes_beside_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flips"
    pristine = folder / "pristine.idx"
    if not pristine.exists():
        folder.mkdir()
        write(folder / "a", [[1, 2], [3], [], [4, 5, 6]])
        write_manifest(folder, make_manifest(folder / "a"))
        (folder / "a.idx").rename(pristine)
    index = bytearray(pristine.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        index[data.draw(st.integers(0, len(index) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    index = index[: data.draw(st.sampled_from([len(index), len(index), 33, 60]))] + data.draw(st.binary(max_size=2))
    (folder / "a.idx").write_bytes(index)
    if bytes(index) == pristine.read_bytes():
        assert check_indexed(folder / "a").num_tokens == 6
        return
    with pytest.raises(DataError):
        check_indexed(folder / "a")
    (folder / "manifest.json").rename(folder / "aside")
    try:  # without a manifest, a shifted document boundary can pass, but no wrong length or pointer
        assert check_indexed(folder / "a").num_tokens == 6
    except DataError:
        pass
    finally:
        (folder / "aside").rename(folder / "manifest.json")


def test_content_is_verified_by_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    with pytest.raises(DataError, match="cannot be verified"):
        check_indexed(tmp_path / "a").verify_content()
    write_manifest(tmp_path, make_manifest(tmp_path / "a"))
    check_indexed(tmp_path / "a").verify_content()
    write(tmp_path / "b", [[1], [2, 3]])
    (tmp_path / "b.idx").rename(tmp_path / "a.idx")  # same sizes, another dataset's index
    with pytest.raises(DataError, match=r"not the file that manifest\.json"):
        check_indexed(tmp_path / "a")
    write(tmp_path / "a", [[1, 2], [4]])
    with pytest.raises(DataError, match=r"a\.bin: sha256"):
        check_indexed(tmp_path / "a").verify_content()


def test_manifest_reads_back_and_detects_every_change(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    manifest = make_manifest(tmp_path / "a")
    path = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.differences(dataclasses.replace(manifest, version="other", encoder="other")) == []
    other = dataclasses.replace(manifest, seed=1, sources=(), options={"json_key": "body"})
    said = ["the input files", "seed 0 instead of 1", "json_key None instead of 'body'"]
    assert manifest.differences(other) == said
    text = path.read_text("utf-8")
    for old, new in (
        ('"seed": 0', '"seed": 1'),
        ('"format": 1', '"format": 2'),
        ("{", "["),
        ('"uint16"', "7"),
        (text, "[]"),
    ):
        path.write_text(text.replace(old, new), "utf-8")
        with pytest.raises(DataError, match=r"manifest\.json: (damaged|format|does not match)"):
            read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="no dataset folder"):
        read_manifest(tmp_path)
