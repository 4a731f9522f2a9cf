"""A result states what the training data holds of its text: from `prepare --decontaminate` through the run to `evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.cli import main
from megatron_lion.runs.sealed_json import read_sealed, write_sealed

PASSAGE = "The quick brown fox jumps over the lazy dog while nine zebras drink cold tea by the river."
TEXT = f"{PASSAGE} And then it ended, as all of these small stories end, with a long and quiet evening."
WORDS = len(TEXT.split())
SMALL = (
    "--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_attention_heads", "2", "--model.seq_length", "16",
    "--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--train.steps", "1", "--train.test_every", "0",
    "--probe.every", "0", "--checkpoint.at_steps", "[]", "--log.progress", "false", "--device", "cpu",
    "--schedule.warmup_steps", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts `own.txt` and `other.tokens`, and a run of one step on data that were searched for them."""
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "own.txt").write_text(TEXT)
    (folder / "other.tokens").write_text(
        "Nothing of this was ever in the training data, because nobody had written it before now."
    )
    documents = [f"Story {number} " + "and so on " * (number % 7 + 3) for number in range(60)]
    documents[20] = f"{documents[20]} {PASSAGE.upper()} {documents[21]}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "train.jsonl").write_text(lines)
    tokenizer, data = str(folder / "tokenizer"), str(folder / "data")
    train = str(folder / "train.jsonl")
    assert main(["tokenizer", "train", "--input", train, "--vocab-size", "270", "--output", tokenizer]) == 0
    (folder / "third.jsonl").write_text(json.dumps({"text": f"{PASSAGE} {PASSAGE}"}) + "\n")
    given = [str(folder / name) for name in ("own.txt", "other.tokens", "third.jsonl")]
    words = ["--input", train, "--tokenizer", tokenizer, "--output", data, "--split", "1"]
    assert main(["prepare", *words, "--decontaminate", *given]) == 0
    run = str(folder / "run")
    assert main(["pretrain", "gpt2-tiny", "--data.path", data, "--run_dir", run, *SMALL]) == 0
    return folder


def evaluate(run: Path, *texts: Path) -> dict[str, Any]:
    words = ["--stride", "full", "--device", "cpu"]
    assert main(["evaluate", str(run), "--text", *map(str, texts), *words]) == 0
    found = [json.loads(path.read_text()) for path in sorted((run / "eval").glob("*.json"))]
    return {Path(record["text_path"]).name: record for record in found}


def test_the_result_carries_the_overlap(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(base / "run", base / "own.txt", base / "other.tokens", base / "third.jsonl", base / "train.jsonl")
    printed = capsys.readouterr().out
    # 18 words of the passage are in one document, and each 13 of them in a row count.
    assert len(PASSAGE.split()) == 18
    (own,) = found["own.txt"]["train_overlaps"]
    assert (own["train_ngrams"], own["ngrams"], own["train_documents"]) == (6, WORDS - 12, 1)
    (other,) = found["other.tokens"]["train_overlaps"]
    assert (other["train_ngrams"], other["train_documents"]) == (0, 0)
    assert found["third.jsonl"]["train_overlaps"][0]["train_ngrams"] == 6, "known by the file's own SHA-256"
    assert found["train.jsonl"]["train_overlaps"] is None, "the data were not searched for this text"
    lines = {name: next(line for line in printed.splitlines() if name in line) for name in found}
    assert f"overlap {6 / (WORDS - 12):.2%}" in lines["own.txt"]
    assert "overlap 0.00%" in lines["other.tokens"]
    assert "overlap" not in lines["train.jsonl"]


def test_another_file_of_the_same_name_is_not_the_text(base: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(base / "run", tmp_path / "run", ignore=shutil.ignore_patterns("eval")))
    (tmp_path / "own.txt").write_text(TEXT + ".")
    (tmp_path / "copy.txt").write_text(TEXT)
    found = evaluate(run, tmp_path / "own.txt", tmp_path / "copy.txt")
    assert found["own.txt"]["train_overlaps"] is None
    assert found["copy.txt"]["train_overlaps"][0]["train_ngrams"] == 6


def test_several_datasets(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(base / "run", tmp_path / "run", ignore=shutil.ignore_patterns("eval")))
    facts = read_sealed(run / "run.json")
    (dataset,) = facts["train_overlaps"]
    joined = [[*dataset, *dataset], dataset]  # the first as `merge` makes it
    write_sealed(run / "run.json", {**facts, "train_overlaps": joined})
    assert len(evaluate(run, base / "own.txt")["own.txt"]["train_overlaps"]) == 3
    assert f"overlap ≥ {6 / (WORDS - 12):.2%}" in capsys.readouterr().out
    # A dataset that was not searched may hold anything, and a run of an earlier version does not state it.
    for stored in ([dataset, []], [], None, [{"path": 1}], "x"):
        shutil.rmtree(run / "eval")
        write_sealed(run / "run.json", {**facts, "train_overlaps": stored})
        assert evaluate(run, base / "own.txt")["own.txt"]["train_overlaps"] is None
