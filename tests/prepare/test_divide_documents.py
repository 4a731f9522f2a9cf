"""A corpus of fewer documents than splits: each document is divided by position, and every split gets its share."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_bpe import write_byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from test_prepare import folder_hashes, read_split, write_jsonl

from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.errors import ConfigError, DataError, StorageError
from megatron_lion.prepare import long_texts, positions
from megatron_lion.prepare.merge_shards import write_splits
from megatron_lion.prepare.pipeline import Manifest, PrepareOptions, prepare, read_manifest
from megatron_lion.prepare.splits import auto_split, document_hash, small_split_warning

BOOK = "\n\n".join(
    f"Chapter {i}. «Ça va?»\nThe fox — the quick one — goes home. {'Again! ' * (i % 7)}" for i in range(400)
)
"""36 kB: paragraphs of two lines, with characters of two and three bytes."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """GPT-2's kind: one id for each byte, a few merges, and the end marker."""

    return write_byte_bpe(tmp_path / "tokenizer", "T h", "Th e")


def book(folder: Path, text: str = BOOK) -> Path:
    path = folder / "my.txt"
    path.write_bytes(text.encode())
    return path


def made(tmp_path: Path, name: str, **changes: Any) -> Manifest:
    options = {"tokenizer": tmp_path / "tokenizer", "output": tmp_path / name, "split": "80,10,10", "workers": 1}
    return prepare(PrepareOptions(**{"inputs": [tmp_path / "my.txt"], **options, **changes}))


def texts(tmp_path: Path, name: str) -> dict[str, list[str]]:
    """Returns the documents of each split as Megatron-Core reads them, decoded byte for byte, without the end marker."""
    manifest = read_manifest(tmp_path / name)
    end = manifest.tokenizer.eod_id
    decode = load_tokenizer(tmp_path / "tokenizer").decode
    found = {split: read_split(tmp_path / name, manifest, split) for split in manifest.splits}
    assert all(ids[-1] == end and end not in ids[:-1] for documents in found.values() for ids in documents)
    return {split: [decode(ids[:-1]) for ids in documents] for split, documents in found.items()}


def test_one_text_file_fills_every_split(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    book(tmp_path)
    manifest = made(tmp_path, "out")
    found = texts(tmp_path, "out")
    assert {name: len(parts) for name, parts in found.items()} == {"train": 1, "valid": 1, "test": 1}
    (train,), (valid,), (test,) = found.values()
    assert train + valid + test == BOOK, "train is the beginning and test the end, and no character is lost"
    for part, share in ((train, 0.8), (valid, 0.1), (test, 0.1)):
        assert abs(len(part.encode()) / len(BOOK.encode()) - share) < 0.01
        assert part.startswith("Chapter "), "the cuts are at blank lines"
    assert (manifest.documents, manifest.sources[0].documents) == (3, 3)
    assert manifest.split == (80, 10, 10)
    assert "my.txt: 1 document for 3 splits" in caplog.text
    assert "80 % train, 10 % valid, 10 % test" in caplog.text


def test_any_form_of_the_document_and_any_number_of_workers_give_the_same(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = book(tmp_path)
    reference = made(tmp_path, "txt").splits
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(BOOK.encode()))
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(BOOK.encode()))
    write_jsonl(tmp_path / "a.jsonl", [BOOK])
    (tmp_path / "a.json").write_text(json.dumps([{"text": BOOK}, {"text": ""}], indent=1))
    for name in ("a.txt.gz", "a.txt.bz2", "a.jsonl", "a.json"):
        assert made(tmp_path, f"of-{name}", inputs=[tmp_path / name]).splits == reference, name
    made(tmp_path, "pool", workers=2)
    assert folder_hashes(tmp_path / "pool") == folder_hashes(tmp_path / "txt")
    # Read in parts of a few characters, with windows that cross the blocks of the stream.
    for name, size in (("_PART_CHARACTERS", 100), ("_BLOCK_BYTES", 48)):
        monkeypatch.setattr(long_texts, name, size)
    monkeypatch.setattr(positions, "_BLOCK_BYTES", 31)
    assert made(tmp_path, "parts").splits == reference
    monkeypatch.setattr("megatron_lion.prepare.pipeline.divides_at_blanks", lambda definition: False)
    assert made(tmp_path, "whole").splits == reference
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "".join(part for (part,) in texts(tmp_path, "parts").values()) == BOOK
    made(tmp_path, "marked")
    assert "".join(part for (part,) in texts(tmp_path, "marked").values()) == BOOK, (
        "only the byte-order mark is dropped"
    )


def test_an_interrupted_preparation_continues_with_its_parts(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    book(tmp_path)

    def fail(*_: object) -> None:
        raise StorageError("disk")

    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", fail)
    with pytest.raises(StorageError):
        made(tmp_path, "out")
    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", write_splits)
    made(tmp_path, "out")
    assert "1 of 1 pieces from an earlier run" in caplog.text
    made(tmp_path, "fresh")
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "fresh")
    caplog.clear()
    made(tmp_path, "out")
    assert "already complete" in caplog.text


def test_another_way_of_dividing_is_another_dataset(tmp_path: Path, tokenizer: Path) -> None:
    book(tmp_path)
    made(tmp_path, "out", divide_documents="never")
    with pytest.raises(ConfigError, match=r"another dataset \(divided None instead of 'by position'\).* --overwrite"):
        made(tmp_path, "out")
    made(tmp_path, "out", overwrite=True)
    with pytest.raises(ConfigError, match=r"another dataset \(divided 'by position' instead of None\)"):
        made(tmp_path, "out", divide_documents="never")
    with pytest.raises(ConfigError, match="another dataset"):
        made(tmp_path, "out", split="90,5,5")


def test_enough_documents_are_not_divided(tmp_path: Path, tokenizer: Path) -> None:
    """Three documents for three splits: the dataset is the one of a version that divides nothing, also for the manifest."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} {BOOK}" for i in range(3)])
    made(tmp_path, "auto", inputs=[source])
    made(tmp_path, "never", inputs=[source], divide_documents="never")
    assert folder_hashes(tmp_path / "auto") == folder_hashes(tmp_path / "never")
    assert "divided" not in read_manifest(tmp_path / "auto").options
    always = made(tmp_path, "always", inputs=[source], divide_documents="always")
    assert [always.splits[name].documents for name in ("train", "valid", "test")] == [3, 3, 3]
    # One document is enough for one split, and two for two.
    book(tmp_path)
    assert "divided" not in made(tmp_path, "one", split="1").options
    assert "divided" not in made(tmp_path, "two", split="9,1", inputs=[source]).options


def test_copies_and_blank_files_are_no_second_document(tmp_path: Path, tokenizer: Path) -> None:
    """Equal texts go to one split together, so two copies of a book would be trained on or held out, not both."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(BOOK)
    (folder / "blank.txt").write_text(" \n" * 50)
    (folder / "empty.txt").touch()
    manifest = made(tmp_path, "out", inputs=[folder])
    found = texts(tmp_path, "out")
    assert [len(parts) for parts in found.values()] == [3, 3, 3]
    assert len({part for parts in found.values() for part in parts}) == 3
    assert (manifest.duplicate_documents, manifest.skipped) == (6, {"empty_document": 2})


def test_documents_too_short_to_divide(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", ["one", "two"])
    assert set(made(tmp_path, "short", inputs=[short]).splits) < {"train", "valid", "test"}
    assert "--divide-documents always" in caplog.text
    both = write_jsonl(tmp_path / "both.jsonl", ["a preface", BOOK])
    made(tmp_path, "both", inputs=[both])
    assert [len(parts) for parts in texts(tmp_path, "both").values()] == [2, 1, 1]


def test_white_space_alone_is_no_part(tmp_path: Path, tokenizer: Path) -> None:
    book(tmp_path, "The fox goes home. " * 40 + "\n" * 400)
    manifest = made(tmp_path, "out")
    assert (set(manifest.splits), manifest.skipped) == ({"train"}, {"empty_document": 2})
    assert "".join(texts(tmp_path, "out")["train"]).startswith("The fox")


def test_bad_bytes_are_reported_by_their_position_in_the_file(tmp_path: Path, tokenizer: Path) -> None:
    path = book(tmp_path)
    data = bytearray(path.read_bytes())
    where = len(data) - 100
    data[where] = 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"my\.txt:1: not UTF-8 between bytes (\d+) and (\d+)") as caught:
        made(tmp_path, "out")
    first, last = (int(word) for word in re.findall(r"bytes (\d+) and (\d+)", str(caught.value))[0])
    assert first <= where + 1 <= last
    assert first > 0.8 * len(data), "counted from the beginning of the file, not of the part"
    with pytest.raises(DataError, match="contains no documents"):
        made(tmp_path, "out", on_error="skip")


def test_sentences_of_one_document(tmp_path: Path, tokenizer: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "home", "goes", "chapter", ".", "!", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    book(tmp_path)
    manifest = made(tmp_path, "out", task="bert", tokenizer=tmp_path / "vocab.txt")
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 1, "valid": 1, "test": 1}
    assert manifest.splits["valid"].tokens > 0.07 * manifest.tokens


@examples(80)
@given(
    text=st.text(st.sampled_from("ab \n.é日\u3002😀\r\t"), min_size=0, max_size=900),
    shares=st.sampled_from(
        [(80.0, 10.0, 10.0), (99.9, 0.05, 0.05), (50.0, 0.0, 50.0), (5.0, 5.0, 90.0), (100.0, 0.0, 0.0)]
    ),
)
def test_the_parts_are_the_document(text: str, shares: tuple[float, float, float]) -> None:
    parts = positions.divide_text(text, shares)
    assert "".join(part for part, _ in parts) == text
    order = [split for _, split in parts]
    size, wanted = len(text.encode()), [index for index in range(3) if shares[index]]
    if size < positions.MIN_BYTES:
        assert len(parts) == 1
        return
    assert order == wanted
    for part, split in parts:
        least = max(shares[split] / 100 * size, 64)
        assert len(part.encode()) > 0.5 * min(least, size - 64 * (len(wanted) - 1)) - 4


def test_cuts_are_at_the_best_kind_of_place_near_the_ideal_position() -> None:
    """Each text has one better place than the blanks, sentence ends and line breaks around it, in reach of the middle."""
    line = "The fox goes home. " * 3
    for better, before in (("\n\n", ""), ("\n \t\n\n", ""), ("\n", ""), (". ", ".")):
        half = (line * 9 if better != ". " else "The fox goes home " * 27).rstrip()
        text = half + better + half
        (first, _), (second, _) = positions.divide_text(text, (50.0, 50.0, 0.0))
        assert first + second == text
        assert first == half + (before or better), better
    (first, _), _ = positions.divide_text("word " * 200, (50.0, 50.0, 0.0))
    assert first.endswith("word")
    # Without any blank: between two characters, not inside one.
    (first, _), (second, _) = positions.divide_text("日" * 999, (50.0, 50.0, 0.0))
    assert abs(len(first) - len(second)) <= 2


def test_the_shares_that_fit_the_size(tmp_path: Path, tokenizer: Path) -> None:
    sizes = [10**exponent for exponent in range(3, 14)]
    shares = [auto_split(size) for size in sizes]
    assert shares[0] == (80, 10, 10)
    assert shares[-1] == auto_split(40 * 10**9) == (99.9, 0.05, 0.05)
    assert [valid for _, valid, _ in shares] == sorted((valid for _, valid, _ in shares), reverse=True)
    for size, (train, valid, test) in zip(sizes, shares, strict=True):
        assert valid == test == pytest.approx((100 - train) / 2)
        # 64 samples of 1,024 tokens of 5 bytes, unless that is more than a twentieth of the corpus.
        assert valid / 100 * size >= min(64 * 1024 * 5, 0.05 * size) * (1 - 1e-9)
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * 50 for i in range(300)])
    manifest = made(tmp_path, "small", inputs=[source], split="auto")
    assert manifest.split == (80, 10, 10)
    low, high = 0.8, 0.9
    mine = [i for i in range(300) if low <= document_hash((f"{i} " * 50).encode(), 1234) / 2**64 < high]
    assert manifest.splits["valid"].documents == len(mine)


def test_a_dataset_of_an_earlier_version_with_its_default_shares_is_complete(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(50)])
    earlier = made(tmp_path, "out", inputs=[source], split="99.9,0.05,0.05")
    caplog.set_level("INFO")
    assert made(tmp_path, "out", inputs=[source], split="auto") == earlier
    assert "already complete" in caplog.text
    made(tmp_path, "new", inputs=[source], split="auto")
    with pytest.raises(ConfigError, match=r"split \(80\.0, 10\.0, 10\.0\) instead of \(90\.0"):
        made(tmp_path, "new", inputs=[source], split="90,5,5")


def test_small_held_out_splits_are_reported_with_a_split_that_helps(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * 60 for i in range(700)])
    manifest = made(tmp_path, "out", inputs=[source], split="99.9,0.05,0.05")
    assert manifest.splits["valid"].documents == 1
    (line,) = [record.getMessage() for record in caplog.records if "noise" in record.getMessage()]
    held_out = [f"{manifest.splits[name].tokens:,} tokens in the {name} split" for name in ("valid", "test")]
    assert line.startswith(f"{held_out[0]} and {held_out[1]}: fewer than 64 samples of 128 tokens (8,192 tokens)")
    caplog.clear()
    advised = line.partition("--split ")[2].partition(" ")[0]
    better = made(tmp_path, "better", inputs=[source], split=advised)
    assert min(better.splits[name].tokens for name in ("valid", "test")) >= 64 * 128
    assert "noise" not in caplog.text


def test_the_length_of_a_sample_in_the_warning_grows_with_the_corpus() -> None:
    assert small_split_warning({"train": 9_000_000, "valid": 66_000, "test": 66_000}) is None
    large = small_split_warning({"train": 9_000_000, "valid": 60_000, "test": 66_000})
    assert large is not None
    assert large.startswith("60,000 tokens in the valid split: fewer than 64 samples of 1,024 tokens")
    assert "more text gives enough" in (small_split_warning({"train": 900, "valid": 50}) or "")
    assert small_split_warning({"train": 50}) is None


def test_choices(tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match="divide_documents 'sometimes': must be one of auto, always, never"):
        dataclasses.replace(PrepareOptions(tokenizer=tokenizer, output="x"), divide_documents="sometimes")
