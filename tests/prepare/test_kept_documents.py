"""Documents that prepare leaves out: too short, equal to an earlier one, or with passages of given texts."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_bpe import write_byte_bpe
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lion.cli import main
from megatron_lion.data.tokenizer_files import byte_letters
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import ConfigError, DataError, StorageError
from megatron_lion.prepare import equal_hashes
from megatron_lion.prepare.kept_documents import Rules, select_documents
from megatron_lion.prepare.merge_shards import splits_of_documents, write_splits
from megatron_lion.prepare.pieces import ReadCount
from megatron_lion.prepare.pipeline import Manifest, PrepareOptions, prepare, read_manifest
from megatron_lion.prepare.shards import EncodedShard, shard_documents
from megatron_lion.prepare.splits import document_hash
from megatron_lion.prepare.workfolder import work_folder

SECRET = "The quick brown fox jumps over the lazy dog while nine zebras drink cold tea by the river."
"""A passage of the test set: 18 words, so six 13-grams."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_bpe(folder, "Ā ā")
    return load_tokenizer(folder)  # one token for each byte of a text without \0\1


@pytest.fixture
def bert_tokenizer(tmp_path: Path) -> Path:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "##s",
        *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path / "vocab.txt"


def texts_with_repeats(count: int) -> list[str]:
    """Documents of 2 to 200 bytes; about half equal an earlier one, and some hold the passage."""
    draw = random.Random(7)
    texts: list[str] = []
    for number in range(count):
        if texts and draw.random() < 0.5:
            texts.append(draw.choice(texts))
            continue
        text = f"{number} " + "word " * draw.randrange(1, 40)
        texts.append(f"{text}{SECRET.upper()} end" if draw.random() < 0.1 else text[: draw.randrange(2, 200)])
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def documents_of(folder: Path, manifest: Manifest) -> dict[str, list[bytes]]:
    """Returns the documents of each split, read by Megatron-Core; the tokenizer's ids are places among its letters."""
    letters = {letter: byte for byte, letter in zip(range(256), ordered_letters(), strict=True)}
    ids = [letters[letter] for letter in byte_letters()]
    found = {}
    for name, split in manifest.splits.items():
        dataset = IndexedDataset(str(folder / split.prefix))
        found[name] = [bytes(ids[token] for token in dataset[i][:-1].tolist()) for i in range(len(dataset))]
    return found


def ordered_letters() -> list[str]:
    """Letters of the bytes 0 to 255 in GPT-2's byte-level BPE, from its definition."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def test_each_rule_leaves_out_its_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = texts_with_repeats(500)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    given = tmp_path / "test_set.txt"
    given.write_text(SECRET)
    kept: list[str] = []
    dropped = dict.fromkeys(("fewer_tokens", "duplicate", "contaminated"), 0)
    for text in texts:
        if len(text) < 20:
            dropped["fewer_tokens"] += 1
        elif text in texts[: len(kept) + sum(dropped.values())]:
            dropped["duplicate"] += 1
        elif SECRET.upper() in text:
            dropped["contaminated"] += 1
        else:
            kept.append(text)
    assert min(dropped.values()) > 10
    options = PrepareOptions(
        inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="8,1,1", min_tokens=20, deduplicate=True,
        decontaminate=[given], drop_contaminated=True,
    )  # fmt: skip
    manifest = prepare(options)
    found = documents_of(tmp_path / "out", manifest)
    shares = {"train": (0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1)}
    for name, (low, high) in shares.items():
        mine = [text.encode() for text in kept if low <= document_hash(text.encode(), 1234) / 2**64 < high]
        assert found[name] == mine
    assert manifest.dropped == dropped
    assert (manifest.documents, manifest.duplicate_documents) == (len(kept), 0)
    assert manifest.text_bytes == sum(map(len, kept))
    assert manifest.tokens == manifest.text_bytes + len(kept) == sum(split.tokens for split in manifest.splits.values())
    assert manifest.sources[0].documents == len(kept)
    (overlap,) = manifest.overlaps
    assert (overlap.documents, overlap.ngrams, overlap.found_ngrams) == (1, 6, 6)
    assert overlap.found_in_documents == sum(SECRET.upper() in text for text in texts)
    assert (overlap.train_ngrams, overlap.train_documents) == (0, 0)
    assert read_manifest(tmp_path / "out") == manifest
    assert prepare(options) == manifest, "the same command finds the dataset complete"
    for change in (
        {"min_tokens": 21},
        {"deduplicate": False},
        {"drop_contaminated": False},
        {"decontaminate": [source]},
    ):
        with pytest.raises(ConfigError, match=f"contains another dataset .*{next(iter(change))}"):
            prepare(dataclasses.replace(options, **change))


def test_without_rules_everything_is_kept_and_only_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = texts_with_repeats(200)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    plain = prepare(PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "plain", split="1"))
    assert (plain.documents, plain.dropped, plain.overlaps) == (200, {}, ())
    assert plain.duplicate_documents == 200 - len(set(texts))
    given = write_jsonl(tmp_path / "given.jsonl", [SECRET, "too short", SECRET[4:], f"{SECRET} And no more words."])
    searched = prepare(
        PrepareOptions(inputs=[source], tokenizer=tokenizer, output=tmp_path / "b", split="1", decontaminate=[given])
    )
    assert searched.splits == plain.splits
    (overlap,) = searched.overlaps
    holders = sum(SECRET.upper() in text for text in texts)
    assert overlap.train_documents == overlap.found_in_documents == holders > 5
    assert (overlap.documents, overlap.ngrams, overlap.train_ngrams) == (4, 10, 6)


def test_ranges_of_hashes_find_the_same_duplicates(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_with_repeats(300)
    sources = [write_jsonl(tmp_path / f"{number}.jsonl", texts[number::3]) for number in range(3)]
    options = PrepareOptions(
        inputs=sources, tokenizer=tokenizer, output=tmp_path / "a", split="8,1,1", deduplicate=True
    )
    once = prepare(options)
    assert once.documents == len(set(texts))
    monkeypatch.setattr(equal_hashes, "_RANGE_DOCUMENTS", 20)
    assert prepare(dataclasses.replace(options, output=tmp_path / "b")).splits == once.splits


def test_equal_halves_of_a_hash_are_no_duplicate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """64 bits alone would take two of 8 million documents for equal once in half a million corpora."""
    monkeypatch.setattr(
        "megatron_lion.prepare.splits.DocumentDigest.first_bytes", lambda self: bytes(8) + self._digest.digest()[:8]
    )
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one", "three"])
    options = PrepareOptions(
        inputs=[source],
        tokenizer=tokenizer,
        output=tmp_path / "a",
        split="1",
        deduplicate=True,
        divide_documents="never",
    )
    assert prepare(options).dropped == {"duplicate": 1}


def test_a_piece_of_several_batches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{number} words" for number in range(2500)]
    for number in (5, 1300, 2400):
        texts[number] = SECRET
    options = PrepareOptions(
        inputs=[write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer=tokenizer, output=tmp_path / "out", split="1",
        decontaminate=[write_jsonl(tmp_path / "given.jsonl", [SECRET])], drop_contaminated=True,
    )  # fmt: skip
    found = documents_of(tmp_path / "out", prepare(options))
    assert found == {"train": [text.encode() for text in texts if text != SECRET]}


def test_a_text_file_in_parts_is_searched_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The parts are cut in the middle of the passage, wherever that is."""
    given = tmp_path / "given.txt"
    given.write_text(SECRET)
    folder = tmp_path / "books"
    folder.mkdir()
    cut = 1 << 18
    for number, shift in enumerate(range(0, len(SECRET), 9)):
        before = ("word " * (cut // 5 + 1))[: cut - shift]
        (folder / f"{number:02}.txt").write_text(f"{before}{SECRET} and so on " + "more " * 30_000)
    (folder / "none.txt").write_text("word " * 70_000)
    holders = len(range(0, len(SECRET), 9))
    options = PrepareOptions(
        inputs=[folder], tokenizer=tokenizer, output=tmp_path / "out", split="1", decontaminate=[given], workers=2
    )
    manifest = prepare(options)
    assert manifest.overlaps[0].train_documents == holders
    assert manifest.overlaps[0].train_ngrams >= 5  # a cut word before the passage's first may join it
    alone = prepare(dataclasses.replace(options, output=tmp_path / "alone", workers=1, drop_contaminated=True))
    assert (alone.documents, alone.dropped) == (1, {"contaminated": holders})


def test_bert_counts_the_sentences_that_are_kept(tmp_path: Path, bert_tokenizer: Path) -> None:
    texts = ["One two. Three four.", "Five.", "One two. Three four.", "Six seven eight. Nine. Ten."]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = PrepareOptions(
        inputs=[source], tokenizer=bert_tokenizer, output=tmp_path / "out", task="bert", split="1", deduplicate=True,
        divide_documents="never",
    )  # fmt: skip
    manifest = prepare(options)
    without = prepare(
        dataclasses.replace(
            options, inputs=[write_jsonl(tmp_path / "b.jsonl", [texts[0], *texts[1:2], texts[3]])],
            output=tmp_path / "without", deduplicate=False,
        )
    )  # fmt: skip
    assert manifest.dropped == {"duplicate": 1}
    assert manifest.sentences == without.sentences
    assert (manifest.sentences["sentences"], manifest.sentences["documents_of_one_sentence"]) == (6, 1)
    assert (manifest.splits, manifest.tokens) == (without.splits, without.tokens)


def test_a_damaged_file_of_overlaps_is_made_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"{number} {SECRET}" for number in range(9)])
    given = write_jsonl(tmp_path / "given.jsonl", [SECRET])
    options = PrepareOptions(
        inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="1", decontaminate=[given]
    )

    def fail(*_: object) -> None:
        raise StorageError("disk")

    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", fail)
    with pytest.raises(StorageError):
        prepare(options)
    monkeypatch.setattr("megatron_lion.prepare.pipeline.write_splits", write_splits)
    (overlaps,) = work_folder(tmp_path / "out").glob("shards-*/*.overlaps")
    overlaps.write_bytes(overlaps.read_bytes()[:-8])
    assert prepare(options).overlaps[0].train_documents == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop-contaminated"], "name them with --decontaminate FILE"),
        (["--min-tokens", "-1"], "min_tokens -1"),
        (["--min-tokens", "100000"], "every document of the input is left out (3 × fewer_tokens)"),
        (["--decontaminate", "short.txt"], "short.txt: none of its 1 documents has 13 words"),
        (["--decontaminate", "nothere.txt"], "nothere.txt: no such file"),
        (["--decontaminate", "other.jsonl"], "other.jsonl:1: no key 'text'"),
    ],
)
def test_refusals(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "tok")
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "other.jsonl").write_text('{"content": "x"}\n')
    assert main(["prepare", "--input", "a.jsonl", "--tokenizer", "tok", "--output", "out", *flags]) in (2, 3)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_lines_of_a_given_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"text": SECRET}) + "\nbroken\n")
    source = write_jsonl(tmp_path / "a.jsonl", [f"{SECRET} end", "other"])
    options = PrepareOptions(
        inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="1", decontaminate=[given]
    )
    with pytest.raises(DataError, match=r"given\.jsonl:2: not JSON"):
        prepare(options)
    assert prepare(dataclasses.replace(options, on_error="skip")).overlaps[0].train_ngrams == 6


def test_the_summary_of_the_command(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "tok")
    texts = [f"document {number} " + "word " * 30 for number in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[0], "x", f"{SECRET} end"])
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"text": SECRET}) + "\n")
    flags: list[Any] = ["--min-tokens", 5, "--deduplicate", "--decontaminate", given, "--split", "1"]
    words = ["prepare", "--input", source, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "out", *flags]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "  left out: 1 fewer_tokens, 1 duplicate\n" in printed
    assert f"  {given}: 6 of its 6 13-grams (100.00%) are in 1 training document\n" in printed


def test_selection_takes_few_bytes_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenWebText has 8 million documents; their 128-bit hashes alone take 128 MB."""
    monkeypatch.setattr(equal_hashes, "_RANGE_DOCUMENTS", 1 << 14)
    count, each = 800, 1000
    draw = np.random.default_rng(0)
    shards = []
    for number in range(count):
        hashes = draw.integers(0, 1 << 64, (2, each), dtype=np.uint64)
        if number == 5:
            hashes[:, :10] = shard_documents(tmp_path, shards[0]).hashes[:, :10]
        parts = np.full(each, 7, "<i4"), hashes.astype("<u8"), np.full(each, 20, "<i8")
        (tmp_path / f"{number}.documents").write_bytes(b"".join(part.tobytes() for part in parts))
        shards.append(
            EncodedShard(
                name=f"{number}",
                documents=each,
                tokens=7 * each,
                text_bytes=20 * each,
                tokens_sha256="",
                documents_sha256="",
                read=ReadCount(),
            )
        )
    tracemalloc.start()
    selection = select_documents(shards, tmp_path, Rules(deduplicate=True), 1)
    members = splits_of_documents(shards, tmp_path, (98.0, 1.0, 1.0), selection, divided=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert selection.dropped == {"duplicate": 10}
    assert np.bincount(members, minlength=256)[[0, 1, 2, 255]].sum() == count * each
    assert np.flatnonzero(members == 255).tolist() == list(range(5000, 5010))
    assert peak < 5 * count * each + 3e6


def test_the_order_of_the_given_texts_does_not_matter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in given:
        path.write_text(f"{SECRET} {path.name}")
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", SECRET])
    for order in (given, given[::-1]):
        options = PrepareOptions(
            inputs=[source], tokenizer=tokenizer, output=tmp_path / "out", split="1", decontaminate=order
        )
        manifest = prepare(options)
    assert [one.path for one in manifest.overlaps] == [str(path) for path in given], "the first dataset is kept"
