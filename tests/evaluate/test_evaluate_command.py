"""`megatron-lion evaluate` on a Hugging Face folder, from the command line to the result files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt2_folders import write_gpt2

from megatron_lion.cli import main
from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.evaluate.evaluate_steps import evaluate_step, follow
from megatron_lion.evaluate.published_results import PUBLISHED, explain, find_published
from megatron_lion.evaluate.tasks import Reader, stream_task
from megatron_lion.evaluate.wikitext import read_text
from megatron_lion.evaluate.wikitext_pages import page_segments

SEQ_LENGTH = 24
WIKI = (
    " \n = Title = \n \n A well @-@ known text , with some words . \n = Other = \n \n It ends , 1 @,@ 000 words on . \n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 that transformers wrote, with a byte-level tokenizer trained on a few sentences."""
    folder = tmp_path_factory.mktemp("gpt2")
    return write_gpt2(folder, [WIKI] * 3, tokens=300, std=0.3, n_positions=SEQ_LENGTH, n_layer=2)


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.txt"
    path.write_text(WIKI, encoding="utf-8")
    return path


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "eval").glob("*.json"))}


def test_every_convention_in_one_command_agrees_with_transformers(
    folder: Path, wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2LMHeadModel

    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text('{"text": "some words and more words"}\n{"text": "a well known text"}\n')
    words = ["evaluate", str(folder), "--wikitext103", str(wiki), "--stride", "5,full", "--lambada", str(lambada),
             "--text", str(wiki), "--device", "cpu", "--batch-size", "3"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = results(folder)
    by_kind = {record["kind"]: record for record in found.values()}
    assert set(by_kind) == {"wikitext103", "text", "wikitext103_pages", "lambada"}
    assert len(found) == 6
    assert "wikitext103-step_0000000-stride5.json" in found
    assert shown.count(" new ") == 6

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = load_tokenizer(folder).encode(
        "\n= Title =\n\nA well-known text, with some words.\n= Other =\n\nIt ends, 1,000 words on.\n"
    )
    record = found["wikitext103-step_0000000-stride5.json"]
    loss = 0.0
    for target in range(1, len(ids)):
        start = max(0, -(-(target - SEQ_LENGTH) // 5)) * 5
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:target]])).logits[0, -1].double()
        loss -= float(logits.log_softmax(-1)[ids[target]])
    assert record["n_tok"] == len(ids) == record["num_targets"] + 1
    assert record["loss"] == pytest.approx(loss / (len(ids) - 1), abs=1e-4)
    assert record["n_orig"] == len(WIKI.strip().split(" "))
    ratio = (record["n_tok"] - 1) / (record["n_orig"] - 1)
    assert record["adjusted_ppl"] == pytest.approx(math.exp(record["loss"] * ratio), rel=1e-12)
    assert record["token_ppl"] == math.exp(record["log_token_ppl"])

    assert main(words) == 0
    assert capsys.readouterr().out.count(" found ") == 6
    assert results(folder) == found  # nothing was measured or written again


def test_a_result_for_other_weights_is_measured_again(
    folder: Path, wiki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(folder), "--text", str(wiki), "--stride", "7", "--device", "cpu"]
    assert main(words) == 0
    (path,) = folder.glob("eval/*stride7.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "state_sha256": "of another checkpoint"}))
    capsys.readouterr()
    assert main(words) == 0
    assert " new " in capsys.readouterr().out
    assert json.loads(path.read_text())["state_sha256"] == record["state_sha256"]
    path.write_text('{"torn')
    assert main(words) == 0
    assert json.loads(path.read_text())["loss"] == record["loss"]


def test_a_quick_look_is_marked(folder: Path, wiki: Path) -> None:
    assert main(["evaluate", str(folder), "--wikitext103", str(wiki), "--max-tokens", "20", "--stride", "8"]) == 0
    record = results(folder)["wikitext103-step_0000000-stride8-first20.json"]
    assert record["max_tokens"] == 20
    assert record["num_targets"] == 19
    assert record["n_tok"] > 20


def test_bf16_is_close_and_kept_apart(folder: Path, wiki: Path) -> None:
    words = ["evaluate", str(folder), "--text", str(wiki), "--stride", "6", "--device", "cpu", "--precision"]
    assert main([*words, "fp32"]) == 0
    assert main([*words, "bf16"]) == 0
    found = [record for name, record in results(folder).items() if "stride6" in name]
    assert {record["precision"] for record in found} == {"fp32", "bf16"}
    # bf16 has 8 significant bits: logits of size ~5 differ by 0.02 each, in both directions.
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.02)


def test_the_precision_is_chosen_by_the_device_and_printed(
    folder: Path, wiki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(folder), "--text", str(wiki), "--stride", "5", "--device", "cpu"]
    assert main(words) == 0
    assert "forward pass in fp32" in capsys.readouterr().out
    assert main([*words, "--precision", "bf16"]) == 0
    assert "forward pass in bf16" in capsys.readouterr().out
    assert main([*words, "--precision", "tf32"]) == 2
    assert "--precision tf32: needs a CUDA device; use fp32" in capsys.readouterr().err
    from megatron_lion.evaluate.open_target import choose_precision

    on_cuda = torch.cuda.is_available()
    assert choose_precision("auto", "auto") == ("bf16" if on_cuda else "fp32")
    assert choose_precision("auto", "cpu") == choose_precision("fp32", "auto") == "fp32"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{folder}"], 2, "nothing to evaluate on"),
        (["{folder}", "--text", "{wiki}", "--stride", "25"], 2, "from 1 to the model's sequence length 24"),
        (["{folder}", "--text", "{wiki}", "--stride", "many"], 2, "give a number of tokens"),
        (["{folder}", "--text", "{wiki}", "--max-tokens", "1"], 2, "at least 2 tokens"),
        (["{folder}", "--text", "{wiki}", "--batch-size", "0"], 2, "--batch-size 0"),
        (["{folder}", "--text", "{wiki}", "--steps", "5"], 4, "no complete checkpoint of step 5"),
        (["{folder}", "--text", "{wiki}", "--watch"], 2, "not a run in training"),
        (["{folder}", "--text", "nowhere.txt"], 3, "no such text file"),
        (["nowhere", "--text", "{wiki}"], 4, "no such folder"),
        (["{empty}", "--text", "{wiki}"], 4, "neither a run"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [word.format(folder=folder, wiki=wiki, empty=tmp_path / "empty") for word in words]
    assert main(["evaluate", *filled]) == code
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_a_bert_run_is_refused(tmp_path: Path, wiki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.yaml").write_text("model: {kind: bert}\n")
    for has_losses in (False, True):  # an imported run has none
        assert main(["evaluate", str(tmp_path / "bert"), "--text", str(wiki)]) == 2
        error = capsys.readouterr().err
        assert "a bert run predicts masked tokens, not next ones" in error
        assert ("run megatron-lion compare" in error) == has_losses
        (tmp_path / "bert" / "metrics.jsonl").write_text("")


def test_a_short_text_is_scored_with_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("some words")
    assert main(["evaluate", str(folder), "--text", str(path), "--stride", "9"]) == 0
    assert "fewer than one window of 24" in capsys.readouterr().err


def test_damaged_and_foreign_weights_are_refused(
    folder: Path, wiki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        (bad / name).write_bytes((folder / name).read_bytes())
    (bad / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert main(["evaluate", str(bad), "--text", str(wiki)]) == 4
    (bad / "model.safetensors").unlink()
    assert main(["evaluate", str(bad), "--text", str(wiki)]) == 4
    assert "no model.safetensors" in capsys.readouterr().err


class FakeRun:
    """A rank of a run whose checkpoint of step s has the loss s / 100 for every token."""

    def __init__(self, rank: int, shared: list[torch.Tensor]) -> None:
        self.rank, self.world_size, self.steps, self.loaded = rank, 2, [100, 200], 0
        self.shared = shared

    def load(self, step: int) -> None:
        self.loaded = step

    def state_sha256(self, step: int) -> str:
        return f"weights of {step}"

    def scorer(self) -> Any:
        return lambda tokens: torch.full((len(tokens), tokens.shape[1] - 1), self.loaded / 100)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        self.shared.append(values)
        return values


def test_only_the_first_rank_writes_and_its_view_decides(folder: Path, wiki: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    reader = Reader(tokenizer=tokenizer, tokenizer_sha256=tokenizer.sha256, seq_length=8, precision="fp32")
    task = stream_task(reader, read_text(wiki, "text"), stride=4)
    for rank in (1, 0):
        run = FakeRun(rank, [])
        (outcome,) = evaluate_step(run, 200, [task], tmp_path, batch_size=2)
        assert outcome.is_new
        assert outcome.path.is_file() == (rank == 0)
        assert outcome.record["loss"] == 2.0
    # Rank 1 finds the file, but the reduced flags of rank 0 (here zeros) decide.
    (outcome,) = evaluate_step(FakeRun(1, []), 200, [task], tmp_path, batch_size=2)
    assert outcome.is_new


def test_following_a_run_yields_each_step_once() -> None:
    looks = iter([[100], [100], [100, 200], [100, 200, 300]])
    run = FakeRun(0, [])
    assert list(follow(run, lambda: next(looks), last_step=300, poll_s=0.0)) == [100, 200, 300]
    assert run.steps == [100, 200, 300]


def test_page_windows_are_those_of_the_harness() -> None:
    # The windows that lm-evaluation-harness documents for 34 tokens and a model of length 10.
    segments = page_segments(range(34), eod_id=-100, seq_length=10)
    assert [(s.ids[:-1].tolist(), s.ids[-s.num_scored :].tolist()) for s in segments] == [
        ([-100, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ([9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
        ([19, 20, 21, 22, 23, 24, 25, 26, 27, 28], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]),
        ([23, 24, 25, 26, 27, 28, 29, 30, 31, 32], [30, 31, 32, 33]),
    ]


def test_explain_names_the_convention_and_ours() -> None:
    mine = {"kind": "wikitext103", "stride": 32, "seq_length": 1024, "step": 7, "max_tokens": None,
            "text_version": "WikiText-103 tokens test", "adjusted_ppl": 41.25}  # fmt: skip
    text = explain(37.50, [mine, {**mine, "step": 3, "adjusted_ppl": 90.0}, {**mine, "stride": 1024, "step": 9}])
    assert "GPT-2 117M" in text
    assert "41.2500 (adjusted_ppl of wikitext103)" in text
    assert "not measured yet (word_ppl of a wikitext103_pages result)" in text
    assert "no published number near it" in explain(1234.5, [])
    for published in PUBLISHED:
        assert published in find_published(published.value)


def test_explain_needs_no_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--explain", "3.284"]) == 0
    assert "GPT-2 Small, LION, step 50000" in capsys.readouterr().out
