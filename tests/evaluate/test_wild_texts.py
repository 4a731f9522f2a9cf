"""Evaluation texts as other tools write them: each gives the loss of its content, or is rejected."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gpt2_folders import write_gpt2
from tokenizers import ByteLevelBPETokenizer

from megatron_lion.cli import main
from megatron_lion.evaluate.lambada import read_passages
from megatron_lion.evaluate.published_results import explain
from megatron_lion.evaluate.wikitext import read_text

SEQ_LENGTH = 16
TEXTS = ["the first document has some words", "a second one", "the third, a little longer than the others"]
BOM = "\ufeff".encode()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a GPT-2 with transformers; its output layer has more rows than the tokenizer has ids."""
    folder = tmp_path_factory.mktemp("gpt2")
    return write_gpt2(folder, TEXTS, tokens=290, std=0.3, vocab_size=340, n_positions=SEQ_LENGTH, n_layer=1)


@pytest.fixture
def folder(model_folder: Path) -> Path:
    """Removes the results of other tests from the model: they measure the same documents, and results are reused."""
    for path in (model_folder / "eval").glob("*.json"):
        path.unlink()
    return model_folder


def ids_of(folder: Path, text: str) -> list[int]:
    return list(ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).encode(text).ids)


def losses(folder: Path, ids: list[int], first: int = 1) -> list[float]:
    """Returns the negative log likelihood of each id from `first` on, each as the last target of a separate window."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for target in range(first, len(ids)):
            logits = model(torch.tensor([ids[max(0, target - SEQ_LENGTH) : target]])).logits[0, -1].double()
            found.append(-float(logits.log_softmax(-1)[ids[target]]))
    return found


def measured(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Runs `evaluate` and returns its new result."""
    before = {path: path.stat().st_mtime_ns for path in (folder / "eval").glob("*.json")}
    assert main(["evaluate", str(folder), *words, "--stride", "1", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert " new " in capsys.readouterr().out, "an earlier result was reused"
    [path] = [path for path in (folder / "eval").glob("*.json") if path.stat().st_mtime_ns != before.get(path)]
    return dict(json.loads(path.read_text()))


def arrow(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


FORMS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
    "bom.jsonl": lambda path: path.write_bytes(BOM + "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    ),
    "a.parquet": lambda path: pq.write_table(pa.table({"text": TEXTS}), path),
    "a.arrow": arrow,
}


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_measured_with_the_token_between_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """As in a prepared dataset: the end-of-document token follows each of them."""
    FORMS[form](tmp_path / form)
    record = measured(folder, capsys, "--text", str(tmp_path / form))
    ids = [index for text in TEXTS for index in (*ids_of(folder, text), 0)]
    expected = losses(folder, ids)
    assert (record["documents"], record["n_tok"]) == (3, len(ids))
    assert record["n_orig"] == sum(len(text.split()) for text in TEXTS)
    assert record["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_result_for_another_key_of_one_file_is_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text, "meta": {"title": text[::-1]}}) + "\n" for text in TEXTS))
    straight = measured(folder, capsys, "--text", str(path))
    reversed_ = measured(folder, capsys, "--text", str(path), "--json-key", "meta.title")
    ids = [index for text in TEXTS for index in (*ids_of(folder, text[::-1]), 0)]
    expected = losses(folder, ids)
    assert reversed_["n_tok"] == len(ids)
    assert reversed_["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert straight["loss"] != reversed_["loss"]


@pytest.mark.parametrize("name", ["plain.txt", "bom.txt", "bom.txt.gz", "bom.TXT", "bom"])
def test_a_byte_order_mark_is_no_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content = b"" if name.startswith("plain") else BOM
    content += TEXTS[0].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    record = measured(folder, capsys, "--text", str(tmp_path / name))
    expected = losses(folder, ids_of(folder, TEXTS[0]))
    assert record["n_tok"] == len(expected) + 1
    assert record["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert record["documents"] is None


def test_wikitext_as_parquet_is_the_text_of_its_tokens_file(shared_data: Path, tmp_path: Path) -> None:
    """On the Hugging Face hub a row is a line, and the row of a blank line is empty."""
    whole = (shared_data / "wikitext" / "wiki.test.tokens").read_bytes()
    lines = whole.decode().split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
    pq.write_table(pa.table({"text": rows}), tmp_path / "test.parquet")
    from_rows, direct = (
        read_text(tmp_path / "test.parquet", "wikitext103"),
        read_text(shared_data / "wikitext" / "wiki.test.tokens", "wikitext103"),
    )
    assert (from_rows.version, from_rows.sha256) == (direct.version, direct.sha256)
    assert from_rows.encoded == direct.encoded


PASSAGES = ["the first document has some words", "a second one"]
LAMBADA_FORMS: dict[str, Callable[[Path], Any]] = {
    "l.jsonl": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)),
    "l.json": lambda path: path.write_text(json.dumps([{"text": text} for text in PASSAGES], indent=1)),
    "l.txt.gz": lambda path: path.write_bytes(gzip.compress(BOM + ("\n".join(PASSAGES) + "\n").encode())),
    "l.parquet": lambda path: pq.write_table(pa.table({"text": PASSAGES}), path),
}


@pytest.mark.parametrize("form", LAMBADA_FORMS)
def test_lambada_by_word_and_by_last_token(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    from transformers import GPT2LMHeadModel

    LAMBADA_FORMS[form](tmp_path / form)
    assert read_passages(tmp_path / form).texts == PASSAGES
    record = measured(folder, capsys, "--lambada", str(tmp_path / form))
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    words, last, right_words, right_last = [], [], 0, 0
    for text in PASSAGES:
        count = len(ids_of(folder, text)) - len(ids_of(folder, text.rpartition(" ")[0]))
        ids = ids_of(folder, text)[-(SEQ_LENGTH + 1) :]
        scores = losses(folder, ids)[-count:]
        words.append(sum(scores))
        last.append(scores[-1])
        with torch.no_grad():
            greedy = model(torch.tensor([ids[:-1]])).logits[0].argmax(-1).tolist()
        right_words += greedy[-count:] == ids[-count:]
        right_last += greedy[-1] == ids[-1]
    assert record["loss"] == pytest.approx(sum(words) / 2, abs=1e-5)
    assert record["log_last_token_ppl"] == pytest.approx(sum(last) / 2, abs=1e-5)
    assert (record["accuracy"], record["last_token_accuracy"]) == (right_words / 2, right_last / 2)
    assert sum(words) > sum(last), "no word of several tokens: the two measures would be one"


@pytest.mark.parametrize("value", [45.99, 55.48, 60.12, 63.24, 35.13, 15.60, 10.87, 8.63])
def test_published_lambada_numbers_have_a_convention(value: float) -> None:
    """Radford et al. 2019, table 3."""
    text = explain(value, [])
    assert "LAMBADA" in text
    assert "last" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--fill-mask", "a [MASK]", "--text", "t.txt"],
            "--fill-mask prints predictions and measures nothing; remove --text",
        ),
        (["--sentence-order", "a", "b", "--watch"], "remove --watch"),
        (["--fill-mask", "a [MASK]", "--lambada", "l.jsonl"], "remove --lambada"),
        (["--fill-mask", "a [MASK]", "--wikitext103", "w.txt"], "remove --wikitext103"),
        (["--fill-mask", "a [MASK]", "--json-key", "body"], "remove --json-key"),
        (["--fill-mask", "a [MASK]", "--stride", "full"], "remove --stride"),
        (["--fill-mask", "a [MASK]", "--pages", "false"], "remove --pages"),
        (["--fill-mask", "a [MASK]", "--batch-size", "2"], "remove --batch-size"),
        (["--fill-mask", "a [MASK]", "--max-tokens", "4"], "remove --max-tokens"),
        (["--sentence-order", "a", "b", "--explain", "3"], "remove --explain"),
        (["--sentence-order", "a", "b", "--pages", "false", "--max-tokens", "4"], "remove --pages, --max-tokens"),
        (["--explain", "3", "--json-key", "body"], "--json-key body: names the text in a file;"),
        (["--lambada", "l.jsonl", "--max-tokens", "5"], "--max-tokens 5: applies to --wikitext103 and --text"),
    ],
)
def test_flags_without_effect_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["evaluate", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_only_the_tokenizers_ids_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This random model has 340 rows, of which at least 50 belong to no token."""
    from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
    from megatron_lion.evaluate.open_target import open_model
    from megatron_lion.evaluate.text_sampling import SamplingSettings, sample

    known = load_tokenizer(folder).vocab_size
    assert known <= 290
    settings = SamplingSettings(max_new_tokens=60, temperature=5.0, top_k=0)
    with open_model(folder, device="cpu", precision="fp32", tokenizer=None) as model:
        model.load(0)
        free = sample(model.logits, [1], 4, settings, seq_length=SEQ_LENGTH, end_id=None)
    assert max(map(max, free)) >= known, "the model never draws such an id: the test would show nothing"
    drawn: list[list[int]] = []
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: drawn.append(list(ids)) or "")
    words = ["--temperature", "5", "--top-k", "0", "--max-new-tokens", "60", "--count", "4", "--prompt", "the"]
    assert main(["generate", str(folder), *words, "--device", "cpu"]) == 0
    assert len(drawn) == 4
    assert max(max(ids, default=0) for ids in drawn) < known
