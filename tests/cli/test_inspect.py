"""`megatron-lion inspect`: numbers against Megatron-Core's reader, and damage that --verify finds."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_bpe import write_byte_bpe
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lion.cli import main
from megatron_lion.data import inspection
from megatron_lion.data.indexed_check import check_indexed
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.data.inspection import lengths_of, spread_samples

PASSAGE = "The quick brown fox jumps over the lazy dog while nine zebras drink cold tea by the river."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    vocabulary = folder / "vocabulary"
    write_byte_bpe(vocabulary, "w o")
    draw = random.Random(3)
    texts = [f"Text {number}:\n" + "x" * draw.randrange(1, 2000) for number in range(120)]
    lines = [json.dumps({"text": text}) for text in [*texts, texts[0], "tiny", f"{PASSAGE} And \x1b[31m more."]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "", "broken"]) + "\n")
    (folder / "given.txt").write_text(PASSAGE)
    words = ["--input", folder / "a.jsonl", "--tokenizer", vocabulary, "--output", folder / "data", "--split", "8,1,1",
             "--deduplicate", "--min-tokens", 6, "--decontaminate", folder / "given.txt", "--on-error", "skip"]  # fmt: skip
    assert main(["prepare", *map(str, words)]) == 0
    return folder / "data"


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_counts_are_those_of_megatrons_reader(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, dataset)
    assert set(facts["splits"]) == {"train", "valid", "test"}
    for name, split in facts["splits"].items():
        reader = IndexedDataset(split["prefix"])
        sizes = reader.sequence_lengths.tolist()
        assert split["documents"] == split["sequences"] == len(sizes)
        assert split["tokens"] == sum(sizes) == facts["manifest"]["splits"][name]["tokens"]
        bits = Counter(size.bit_length() for size in sizes)
        assert split["lengths"]["documents"] == [bits[k] for k in range(max(bits) + 1)]
        assert split["lengths"]["tokens"] == [
            sum(s for s in sizes if s.bit_length() == k) for k in range(max(bits) + 1)
        ]
        assert (split["lengths"]["shortest"], split["lengths"]["longest"]) == (min(sizes), max(sizes))


def test_the_tables(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dataset), "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")
    ]
    counts = {tuple(row[:2]): row[2] for row in rows if len(row) == 3}
    assert counts[("left out", "fewer_tokens")] == counts[("left out", "duplicate")] == "1"
    assert counts[("skipped", "blank_line")] == counts[("rejected", "not_json")] == "1"
    (overlap,) = [row for row in rows if row[0].endswith("given.txt")]
    assert overlap[1:3] == ["6", "6"]
    manifest = json.loads((dataset / "manifest.json").read_text())
    for split in manifest["splits"].values():
        assert [f"{split['prefix']}.bin", f"{split['bin_bytes']:,}", split["bin_sha256"]] in rows
    assert printed.count("\n  Text ") + printed.count(f"\n  {PASSAGE}") == 9, "three samples of each split, on one line"


def test_each_sample_is_one_line_of_what_can_be_printed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dataset), "--samples", "1000"]) == 0
    printed = capsys.readouterr().out
    assert sum(line.startswith("  ") for line in printed.splitlines()) == 121
    assert f"\n  {PASSAGE} And \\x1b[31m more.<|endoftext|>\n" in printed
    assert all(line.isprintable() for line in printed.splitlines())


def test_samples_are_spread_over_the_documents(dataset: Path) -> None:
    info = check_indexed(dataset / "train_text_document")
    reader = IndexedDataset(str(info.prefix))
    for count in (0, 1, 2, 7, info.num_documents, 10 * info.num_documents):
        samples = spread_samples(info, count)
        numbers = [sample.number for sample in samples]
        assert len(numbers) == min(count, info.num_documents)
        assert numbers == sorted(set(numbers))
        if 1 < count <= info.num_documents:
            assert max(np.diff([-1, *numbers, info.num_documents])) <= info.num_documents / count + 1
        assert all(np.array_equal(sample.ids, reader[sample.number]) for sample in samples)


def test_documents_of_several_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any size, with documents that have no sentence, and sentences that have no token."""
    draw = random.Random(5)
    documents = [[draw.randrange(9) for _ in range(draw.randrange(4))] for _ in range(50)]
    with IndexedWriter(tmp_path / "a", vocab_size=300) as writer:
        for sentences in documents:
            writer.add_document(np.arange(sum(sentences)), sentences)
        info = writer.finalize()
    totals = [sum(sentences) for sentences in documents]
    for block in (1, 7, 50, 1000):
        monkeypatch.setattr(inspection, "_BLOCK_DOCUMENTS", block)
        found = lengths_of([info])
        assert list(found.documents) == [
            sum(total.bit_length() == k for total in totals) for k in range(max(totals).bit_length() + 1)
        ]
        assert sum(found.tokens) == sum(totals)
    samples = spread_samples(info, 50)
    assert [sample.ids.tolist() for sample in samples] == [list(range(total)) for total in totals]


def test_a_plain_pair(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(dataset / f"train_text_document{ending}", tmp_path / f"plain{ending}")
    facts = as_json(capsys, tmp_path / "plain.bin")
    assert list(facts["splits"]) == ["all"]
    assert facts["manifest"] is None
    assert main(["inspect", str(tmp_path / "plain"), "--samples", "1"]) == 0
    first = IndexedDataset(str(tmp_path / "plain"))
    sample = capsys.readouterr().out.splitlines()[-1].strip().rstrip("…").split(" ")[:5]
    assert sample == [str(token) for token in first[len(first) // 2][:5]]
    assert main(["inspect", str(tmp_path / "plain"), "--verify"]) == 3
    assert "cannot be verified: no manifest.json" in capsys.readouterr().err


def test_verify_reads_everything(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dataset), "--verify", "--samples", "0"]) == 0
    assert "verified 6 files" in capsys.readouterr().err
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    with open(copy / "valid_text_document.bin", "r+b") as stream:
        stream.seek(100)
        byte = stream.read(1)
        stream.seek(100)
        stream.write(bytes([byte[0] ^ 1]))
    assert main(["inspect", str(copy)]) == 0, "without --verify the tokens are not read"
    capsys.readouterr()
    assert main(["inspect", str(copy), "--verify"]) == 3
    assert "valid_text_document.bin: sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothere"], 3, "nothere.idx: no such file"),
        (["empty"], 3, "empty: no manifest.json"),
        (["a.txt"], 3, "a.txt: is a file of text or something else; give a dataset folder"),
        (["empty", "--samples", "-1"], 2, "--samples -1: must be 0 or more"),
    ],
)
def test_mistakes(
    words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.txt").write_text("text")
    assert main(["inspect", *words]) == code
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
