"""prepare: contents of the splits, reproducibility after interruptions and at any number of workers, refusals."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from byte_bpe import write_byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.corpora import check_splits, open_corpora
from megatron_lion.data.indexed_writer import check_indexed
from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.errors import BusyError, ConfigError, DataError, StorageError
from megatron_lion.prepare.merge_shards import write_splits
from megatron_lion.prepare.pipeline import Manifest, PrepareOptions, prepare, read_manifest
from megatron_lion.prepare.splits import assign_splits, document_hash, parse_split
from megatron_lion.prepare.workfolder import locked_work_folder, work_folder

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(i % 50 + 3)) for i in range(400)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_byte_bpe(tmp_path / "tokenizer", "w o", "r d", "wo rd")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def read_split(folder: Path, manifest: Manifest, name: str) -> list[list[int]]:
    """Returns the documents of a split, read by Megatron-Core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / manifest.splits[name].prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def folder_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_documents_land_in_order_in_their_splits(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    output = tmp_path / "made/here"
    manifest = prepare(PrepareOptions(inputs=[source], tokenizer=tokenizer, output=output, split="80,10,10"))
    loaded = load_tokenizer(output / "tokenizer")
    assert loaded.sha256 == manifest.tokenizer.sha256 == load_tokenizer(tokenizer).sha256
    bounds = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}
    for name, (low, high) in bounds.items():
        mine = [text for text in TEXTS if low <= document_hash(text.encode(), 1234) / 2**64 < high]
        assert read_split(output, manifest, name) == [[*loaded.encode(text), loaded.eod_id] for text in mine]
        check_indexed(output / f"{name}_text_document").verify_content()
    assert manifest.documents == sum(split.documents for split in manifest.splits.values()) == len(TEXTS)
    assert manifest.tokens == sum(split.tokens for split in manifest.splits.values())
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.sources[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.sources[0].documents == len(TEXTS)
    assert read_manifest(output) == manifest
    assert not work_folder(output).exists()


def test_one_split_is_byte_identical_to_megatrons_builder(tmp_path: Path, tokenizer: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="1"))
    loaded = load_tokenizer(tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in TEXTS:
        ids = [*loaded.encode(text), loaded.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        ours = (tmp_path / f"out/train_text_document{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs{ending}").read_bytes()


def test_same_tokens_from_any_form_of_the_same_documents(tmp_path: Path, tokenizer: Path) -> None:
    plain = write_jsonl(tmp_path / "one/all.jsonl", TEXTS)
    for number in range(3):
        part = write_jsonl(tmp_path / f"many/part{number}.jsonl", TEXTS[number * 150 : (number + 1) * 150])
        (tmp_path / f"many/part{number}.jsonl.gz").write_bytes(gzip.compress(part.read_bytes()))
        part.unlink()
    made = [
        prepare(PrepareOptions(inputs=[plain], tokenizer=tokenizer, output=tmp_path / "a", split="8,1,1")),
        prepare(PrepareOptions(inputs=[tmp_path / "many"], tokenizer=tokenizer, output=tmp_path / "b", split="8,1,1")),
        prepare(PrepareOptions(tokenizer=tokenizer, output=tmp_path / "c", split=(8, 1, 1)), documents=iter(TEXTS)),
    ]
    assert made[0].splits == made[1].splits == made[2].splits
    assert [source.documents for source in made[1].sources] == [150, 150, 100]


def test_pool_gives_the_same_bytes_as_one_process(tmp_path: Path, tokenizer: Path) -> None:
    texts = [f"{text} {i}" for i in range(12) for text in TEXTS]  # enough for several pieces
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert source.stat().st_size > 3 << 18
    options = PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "one", split="8,1,1", workers=1)
    prepare(options)
    prepare(dataclasses.replace(options, output=tmp_path / "two", workers=2))
    assert folder_hashes(tmp_path / "one") == folder_hashes(tmp_path / "two")


def test_first_bad_line_is_named_in_the_corpus_order(tmp_path: Path, tokenizer: Path) -> None:
    texts = [f"{text} {i}" for i in range(12) for text in TEXTS]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3000], lines[2999] = '{"text": 5}', "broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    options = PrepareOptions(inputs=[tmp_path / "a.jsonl"], tokenizer=tokenizer, output=tmp_path / "out", workers=2)
    with pytest.raises(DataError, match=r"a\.jsonl:3000: not JSON: .* --on-error skip"):
        prepare(options)
    assert not (tmp_path / "out").exists()
    manifest = prepare(dataclasses.replace(options, on_error="skip"))
    assert manifest.rejected == {"not_a_string": 1, "not_json": 1}
    assert manifest.documents == len(texts) - 2


def test_fixed_file_reuses_the_shards_of_the_others(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", TEXTS[:200])
    bad = tmp_path / "b.jsonl"
    bad.write_text("oops\n")
    options = PrepareOptions(inputs=[good, bad], tokenizer=tokenizer, output=tmp_path / "out", split="8,1,1")
    caplog.set_level("INFO")
    with pytest.raises(DataError, match=r"b\.jsonl:1: not JSON"):
        prepare(options)
    assert "run the same command again to continue" in caplog.text
    write_jsonl(bad, TEXTS[200:])
    fixed = prepare(options)
    assert "1 of 2 pieces from an earlier run" in caplog.text
    fresh = prepare(dataclasses.replace(options, output=tmp_path / "fresh"))
    assert fixed.splits == fresh.splits


def test_damaged_shards_are_made_again(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="8,1,1")

    def fail(*_: object) -> None:
        raise StorageError("disk")

    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", fail)
    with pytest.raises(StorageError):
        prepare(options)
    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", write_splits)
    (shard,) = work_folder(tmp_path / "out").glob("shards-*/*.tokens")
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    made = prepare(options)
    assert made.splits == prepare(dataclasses.replace(options, output=tmp_path / "fresh")).splits


def test_existing_output(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    output = tmp_path / "out"
    options = PrepareOptions(inputs=[source], tokenizer=tokenizer, output=output)
    first = prepare(options)
    caplog.set_level("INFO")
    assert prepare(options) == first
    assert "already complete" in caplog.text
    with pytest.raises(ConfigError, match=r"contains another dataset .seed 1234 instead of 7.*--overwrite"):
        prepare(dataclasses.replace(options, seed=7))
    write_jsonl(source, TEXTS[:-1])
    with pytest.raises(ConfigError, match="the input files"):
        prepare(options)
    assert read_manifest(output) == first
    second = prepare(dataclasses.replace(options, overwrite=True))
    assert second.documents == len(TEXTS) - 1
    with open(output / "train_text_document.bin", "r+b") as stream:
        stream.write(b"\xff")
    with pytest.raises(DataError, match=r"train_text_document\.bin: sha256"):
        prepare(options)
    assert prepare(dataclasses.replace(options, overwrite=True)) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out", "tokenizer"]


def test_foreign_folders_are_never_replaced(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("dear reader")
    for output in ("out", "a.jsonl"):
        with pytest.raises(ConfigError, match="choose another --output"):
            prepare(PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / output, overwrite=True))
    assert (tmp_path / "out/thesis.tex").read_text() == "dear reader"
    (tmp_path / "out/thesis.tex").unlink()
    prepare(PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "out"))


def test_refusals(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('\n{"text": ""}\n')
    options = PrepareOptions(inputs=[empty], tokenizer=tokenizer, output=tmp_path / "out")
    with pytest.raises(DataError, match=r"empty\.jsonl: contains no documents \(1 × blank_line, 1 × empty_document\)"):
        prepare(options)
    empty.write_text("")
    with pytest.raises(DataError, match="no lines at all"):
        prepare(options)
    write_jsonl(empty, TEXTS)
    mine = rf"in use by another prepare \(pid {os.getpid()} on "
    with locked_work_folder(tmp_path / "out"), pytest.raises(BusyError, match=mine):
        prepare(options)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"\d MB free, about .* MB needed"):
        prepare(options)
    for wrong in ({"workers": -1}, {"on_error": "ignore"}, {"format": "csv"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PrepareOptions(tokenizer=tokenizer, output="x", **wrong)
    assert not (tmp_path / "out").exists()


def test_documents_without_end_marker(tmp_path: Path, tokenizer: Path) -> None:
    options = PrepareOptions(tokenizer=tokenizer, output=tmp_path / "out", append_eod=False, split="1")
    manifest = prepare(options, documents=TEXTS[:5])
    loaded = load_tokenizer(tokenizer)
    assert read_split(tmp_path / "out", manifest, "train") == loaded.encode_batch(TEXTS[:5])


def test_copies_of_a_text_are_no_reason_to_take_from_its_split() -> None:
    quarter = 1 << 62
    hashes = np.array([1, 2, *[2 * quarter + 1] * 10], dtype=np.uint64)  # two texts of train, one of valid ten times
    assert assign_splits(hashes, (50.0, 25.0, 25.0)).tolist() == [0, 2, *[1] * 10]


def test_small_corpora_fill_every_split_they_can(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = PrepareOptions(tokenizer=tokenizer, output=tmp_path / "three")
    manifest = prepare(options, documents=["one", "two", "three"])
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 1, "valid": 1, "test": 1}
    manifest = prepare(dataclasses.replace(options, output=tmp_path / "two"), documents=["one", "two", "one"])
    assert len(manifest.splits) == 2
    assert manifest.duplicate_documents == 1
    assert "only 2 distinct documents: too few for a test split" in caplog.text


@examples(80)
@given(
    values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30),
    weights=st.tuples(*[st.sampled_from([0.0, 0.05, 1.0, 99.9])] * 3).filter(any),
)
def test_split_rule(values: list[int], weights: tuple[float, float, float]) -> None:
    hashes, split = np.array(values, dtype=np.uint64), parse_split(weights)
    members = assign_splits(hashes, split)
    wanted = {index for index in range(3) if split[index] > 0}
    assert set(members.tolist()) <= wanted
    assert len(set(members.tolist())) == min(len(wanted), len(set(values))), "every split that can be filled is"
    for value in set(values):
        assert len({int(m) for m, v in zip(members, values, strict=True) if v == value}) == 1, (
            "duplicates stay together"
        )
    order = np.random.default_rng(0).permutation(len(values))
    assert np.array_equal(assign_splits(hashes[order], split), members[order])


def test_split_shares_are_met() -> None:
    hashes = np.array([document_hash(b"%d" % i, seed=3) for i in range(20_000)], dtype=np.uint64)
    share = np.bincount(assign_splits(hashes, (80.0, 15.0, 5.0)), minlength=3) / hashes.size
    # Three standard deviations of a binomial share at p = 0.8 and n = 20,000: 0.0085.
    assert np.abs(share - [0.8, 0.15, 0.05]).max() < 0.0085
    for bad in ("", "1,2,3,4", "-1,2", "0,0,0", "a,b", "nan", "inf"):
        with pytest.raises(ConfigError, match=r"99\.9,0\.05,0\.05"):
            parse_split(bad)


def test_a_dataset_of_fewer_documents_than_splits_names_the_remedy(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One text file is one document: a larger share of the split cannot help."""
    (tmp_path / "my.txt").write_text("a chapter\n\nof a book\n\nthat ends\n" * 9)
    options = PrepareOptions(
        inputs=[tmp_path / "my.txt"],
        tokenizer=tokenizer,
        split="8,1,1",
        output=tmp_path / "one",
        divide_documents="never",
    )
    prepare(options)
    assert "only 1 distinct document: too few for a test split" in caplog.text
    assert "--divide-documents always" in caplog.text
    caplog.clear()
    data, model = DataConfig(path=[str(tmp_path / "one")]), ModelConfig(seq_length=16)
    remedy = r"no valid split, because the dataset has 1 document; .* --overwrite --divide-documents always"
    with pytest.raises(DataError, match=remedy):
        check_splits(open_corpora(data, model), [1, 1, 1])
    prepare(dataclasses.replace(options, divide_documents="always", overwrite=True))
    assert "too few" not in caplog.text
    check_splits(open_corpora(data, model), [1, 1, 1])


class CutsShort:
    """Progress that removes the file's end before the file is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str, total_bytes: int) -> None:
        if name == "encoding":
            os.truncate(self.path, self.path.stat().st_size - 20)

    def advance(self, num_bytes: int) -> None:
        """Does nothing."""


def test_a_file_that_is_cut_short_meanwhile_is_no_bad_line(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = PrepareOptions(inputs=[path], tokenizer=tokenizer, output=tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        prepare(options, progress=CutsShort(path))
