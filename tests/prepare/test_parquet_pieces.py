"""Parquet files with large row groups are cut inside them: the same documents and row numbers, in little memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from byte_bpe import write_byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.errors import DataError, StorageError
from megatron_lion.evaluate.text_rows import read_rows
from megatron_lion.prepare import tables
from megatron_lion.prepare.find_files import input_file
from megatron_lion.prepare.pieces import Piece, ReadCount, ReadOptions, cut_pieces, read_documents, read_piece
from megatron_lion.prepare.pipeline import DIVIDED, PrepareOptions, prepare
from megatron_lion.prepare.workfolder import work_folder

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PIECE = 1 << 15
SKIP = ReadOptions(on_error="skip")


def texts_of(total: int, seed: int = 0) -> list[str]:
    """Distinct texts of about `total` bytes together, of very different lengths."""
    draw, texts, size = random.Random(seed), list[str](), 0
    while size < total:
        texts.append(f"{len(texts)} é " + "word " * int(draw.expovariate(1 / 40)))
        size += len(texts[-1].encode())
    return texts


def pieces_of(path: Path, key: str = "text", piece_bytes: int = PIECE) -> list[Piece]:
    return list(cut_pieces(input_file(path), piece_bytes, key))


def texts_in(pieces: list[Piece], key: str = "text") -> list[list[str]]:
    return [list(read_piece(piece, dataclasses.replace(SKIP, json_key=key), ReadCount())) for piece in pieces]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_byte_bpe(tmp_path / "tokenizer", "w o", "r d", "wo rd")


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*_text_document.*")}


TYPES = {
    "string": lambda held: held,
    "large_string": lambda held: held.cast(pyarrow.large_string()),
    "string_view": lambda held: held.cast(pyarrow.string_view()),
    "dictionary": lambda held: held.dictionary_encode(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_large_row_groups_are_cut_and_small_ones_are_not(tmp_path: Path, kind: str) -> None:
    texts: list[str | None] = [*texts_of(400_000), None, "", "end"]
    table = pyarrow.table({"n": list(range(len(texts))), "text": TYPES[kind](pyarrow.array(texts, pyarrow.string()))})
    parquet.write_table(table, tmp_path / "one.parquet", row_group_size=1 << 20, use_dictionary=False)
    pieces = pieces_of(tmp_path / "one.parquet")
    assert [text for part in texts_in(pieces) for text in part] == [text for text in texts if text]
    assert len(pieces) == pytest.approx(400_000 / PIECE, abs=2)
    assert all(piece.data is not None and len(piece.data) < 2 * PIECE for piece in pieces)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert sum(piece.stored_bytes for piece in pieces) == (tmp_path / "one.parquet").stat().st_size
    parquet.write_table(table, tmp_path / "many.parquet", row_group_size=len(texts) // 9)
    pieces = pieces_of(tmp_path / "many.parquet")
    if kind != "dictionary":  # the whole dictionary is in each row group
        assert [(piece.start, piece.data) for piece in pieces] == [(number, None) for number in range(10)]
    assert [text for part in texts_in(pieces) for text in part] == [text for text in texts if text]


def test_only_the_column_of_the_text_counts(tmp_path: Path) -> None:
    texts = texts_of(300_000)
    table = pyarrow.table({"text": texts, "short": [text[:2] for text in texts], "other": texts[::-1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [piece.data for piece in pieces_of(tmp_path / "a.parquet", "short")] == [None]
    assert texts_in(pieces_of(tmp_path / "a.parquet", "short"), "short") == [[text[:2] for text in texts]]
    pieces = pieces_of(tmp_path / "a.parquet", "other")
    assert len(pieces) > 3
    assert [text for part in texts_in(pieces, "other") for text in part] == texts[::-1]


def test_the_key_reaches_every_reader(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The column `text`, the default, holds many distinct texts here, and `body` two that are divided by position."""
    caplog.set_level("INFO")
    books = ["".join(texts_of(300_000, seed)) for seed in (1, 2)]
    table = pyarrow.table({"text": [f"{i} {books[0]}" for i in range(6)], "body": books * 3})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in books * 3))
    for name in ("a.parquet", "a.jsonl"):
        manifest = prepare(PrepareOptions(inputs=[tmp_path / name], tokenizer=tokenizer, output=tmp_path / f"of {name}",
                                          split="8,1,1", workers=1, json_key="body"))  # fmt: skip
        assert manifest.options[DIVIDED] == "by position"
        assert manifest.text_bytes == 3 * sum(len(book.encode()) for book in books)
    assert hashes(tmp_path / "of a.parquet") == hashes(tmp_path / "of a.jsonl")
    caplog.clear()
    texts = texts_of(600_000)
    table = pyarrow.table({"text": ["t"] * len(texts), "body": texts})
    parquet.write_table(table, tmp_path / "b.parquet", compression="none", use_dictionary=False)
    options = PrepareOptions(
        inputs=[tmp_path / "b.parquet"], tokenizer=tokenizer, output=tmp_path / "b", json_key="body"
    )
    manifest = prepare(options)
    expected = float(re.findall(r"about ([\d,]+) tokens", caplog.text)[0].replace(",", ""))
    assert 0.5 < expected / manifest.tokens < 2, "the sample is of the column, and its size is known"


def test_columns_in_structures_and_of_equal_names(tmp_path: Path) -> None:
    texts = texts_of(200_000)
    rows = [{"meta": {"text": text, "n": 1}, "a": {"b": "no"}, "a.b": text.upper()} for text in texts]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for key, expected in (("meta.text", texts), ("a.b", [text.upper() for text in texts])):
        pieces = pieces_of(tmp_path / "a.parquet", key)
        assert len(pieces) > 3
        assert [text for part in texts_in(pieces, key) for text in part] == expected
        assert list(read_documents([tmp_path / "a.parquet"], ReadOptions(key))) == expected
    twice = pyarrow.table([pyarrow.array(texts), pyarrow.array(texts)], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: two columns are named 'text'"):
        pieces_of(tmp_path / "b.parquet")
    for key in ("body", "meta.body"):
        with pytest.raises(DataError, match=f"no column '{key}'"):
            list(read_documents([tmp_path / "a.parquet"], ReadOptions(key)))


def test_rows_are_numbered_over_the_pieces(tmp_path: Path) -> None:
    texts: list[Any] = texts_of(300_000)
    texts[len(texts) * 2 // 3] = None
    texts[len(texts) * 2 // 3 + 5] = " \n"
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    row = len(texts) * 2 // 3 + 1
    said = rf"a\.parquet: row {row}: 'text' is null; a string is needed"
    with pytest.raises(DataError, match=said + "; fix it, or skip such rows"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(DataError, match=said):
        list(read_rows(input_file(tmp_path / "a.parquet"), "text"))
    count = ReadCount()
    assert list(read_documents([tmp_path / "a.parquet"], SKIP, count)) == [
        text for text in texts if text and not text.isspace()
    ]
    assert (count.lines, count.rejected, count.skipped) == (len(texts), {"not_a_string": 1}, {"empty_document": 1})
    texts[row - 1] = "whole"
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert [text for _, text in read_rows(input_file(tmp_path / "a.parquet"), "text")] == texts


@examples(25)
@given(
    sizes=st.lists(st.integers(0, 5000) | st.none(), min_size=1, max_size=60), piece_bytes=st.integers(1, 9000),
    batch=st.sampled_from([1, 10**5, 10**7]), group=st.integers(1, 80),
)  # fmt: skip
def test_the_cut_does_not_depend_on_how_batches_are_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int | None], piece_bytes: int, batch: int, group: int
) -> None:
    """Shards are found again by the number of their piece, so it must always hold the same rows."""
    path = tmp_path_factory.mktemp("cut") / "a.parquet"
    texts = [None if size is None else f"{i}:" + "x" * size for i, size in enumerate(sizes)]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path, row_group_size=group)
    expected: list[list[str]] = []
    for start in range(0, len(texts), group):
        held: list[str] = []
        for place, text in enumerate(texts[start : start + group], start=start):
            held += [text] if text else []
            if sum(map(len, held)) >= piece_bytes or place == min(start + group, len(texts)) - 1:
                expected, held = [*expected, held], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_column_bytes", lambda *_: 10**6)
        patch.setattr(tables, "_BATCH_BYTES", batch)
        assert texts_in(pieces_of(path, piece_bytes=piece_bytes)) == expected


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """What pyarrow allocates while a row group is cut and read stays below a fraction of its text."""
    peaks = []
    for megabytes in (10, 40):
        texts = [f"{i} " + "word " * 1000 for i in range(megabytes * 200)]
        parquet.write_table(
            pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1 << 30, use_dictionary=False
        )
        assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
        before = pyarrow.default_memory_pool()
        pool = pyarrow.proxy_memory_pool(before)
        pyarrow.set_memory_pool(pool)
        try:
            number = sum(
                len(part)
                for piece in cut_pieces(input_file(tmp_path / "a.parquet"), 1 << 18)
                for part in texts_in([piece])
            )
            small = dataclasses.replace(pieces_of(tmp_path / "a.parquet", piece_bytes=1 << 30)[0])
            assert small.data is None
            number += sum(1 for _ in read_piece(small, SKIP, ReadCount()))
        finally:
            pyarrow.set_memory_pool(before)
        assert number == 2 * len(texts)
        peaks.append(pool.max_memory() / 1e6)
    assert peaks[1] < 1.2 * peaks[0] + 1, peaks


def test_token_files_are_those_of_json_lines(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = texts_of(1_300_000)
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given_ = PrepareOptions(
        inputs=[tmp_path / "a.jsonl"], tokenizer=tokenizer, output=tmp_path / "twin", split="8,1,1", workers=1
    )
    prepare(given_)
    given_ = dataclasses.replace(given_, inputs=[tmp_path / "a.parquet"])
    for workers in (1, 2):
        prepare(dataclasses.replace(given_, output=tmp_path / str(workers), workers=workers))
        assert hashes(tmp_path / str(workers)) == hashes(tmp_path / "twin")

    def fail(*_: object) -> None:
        raise StorageError("disk")

    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_lion.prepare.pipeline.write_splits", fail)
        with pytest.raises(StorageError):
            prepare(dataclasses.replace(given_, output=tmp_path / "again"))
    (folder,) = work_folder(tmp_path / "again").glob("shards-*")
    names = sorted(path.stem for path in folder.glob("*.json"))
    assert len(names) > 3
    # Before, a piece was a row group and its shards were named -parquet-1-NUMBER; number 0 held all rows of this file.
    assert all("-parquet-rows-1-" in name for name in names)
    for path in list(folder.iterdir()):
        path.rename(path.with_name(path.name.replace("-parquet-rows-", "-parquet-")))
    prepare(dataclasses.replace(given_, output=tmp_path / "again"))
    assert "from an earlier run" not in caplog.text
    assert hashes(tmp_path / "again") == hashes(tmp_path / "twin")
