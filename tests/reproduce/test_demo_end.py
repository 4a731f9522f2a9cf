"""The demo's last screen: its numbers are those of the records on disk, and its sentences follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.compare.selection import read_runs
from megatron_lion.errors import ConfigError
from megatron_lion.prepare.demo_corpus import build_demo_corpus
from megatron_lion.reproduce.headline import explanation, headline_table, next_steps
from megatron_lion.runs.record import RunRecord

ENDS = {"lion": (5.612, 5.59, 5.9), "sgd": (5.58, 5.561, 5.86), "adamw": (5.51, 5.499, 5.831)}


def write_demo_run(folder: Path, optimizer: str, lr: float, *, last: float, test: float, valid: float) -> Path:
    """A synthetic run of 400 steps with the given last values; those of earlier steps are other numbers."""
    write_run(folder, optimizer=optimizer, model="gpt2-demo", d=1_071_872, steps=400, lr=lr, eval_steps=(200, 400))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 400 and "test/loss" in line:
            line |= {"test/loss": test, "valid/loss": valid}
        if "probe/norm_ratio" in line:
            line["probe/norm_ratio_over_sqrt_d"] = 0.25 + line["step"] / 4000
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (folder / "eval").iterdir():
        result = json.loads(path.read_text())
        if result["step"] == 400:
            path.write_text(json.dumps({**result, "log_token_ppl": last}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecord]:
    rates = {"lion": 3e-4, "sgd": 0.3, "adamw": 1e-3}
    folders = [
        write_demo_run(tmp_path / name, name, rates[name], valid=valid, test=test, last=last)
        for name, (valid, test, last) in ENDS.items()
    ]
    return read_runs(folders)


def test_the_table_holds_the_values_of_the_last_step(runs: list[RunRecord]) -> None:
    lines = headline_table(runs).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[1:]] == [
        ["LION", "0.0003", "5.612", "5.590", "5.900", "0.350"],
        ["SGD", "0.3", "5.580", "5.561", "5.860", "0.350"],
        ["AdamW", "0.001", "5.510", "5.499", "5.831", "0.350"],
    ]
    assert lines[0].split("  ")[0] == "optimizer"
    assert all(heading in lines[0] for heading in ("rate", "valid loss", "test loss", "ln perplexity", "r/√d"))


def test_a_value_that_is_missing_is_a_dash(tmp_path: Path) -> None:
    write_run(tmp_path / "run", model="gpt2-demo", d=1_071_872, eval_steps=(200,), probes=False)
    row = headline_table(read_runs([tmp_path / "run"])).splitlines()[1].split()
    assert row[-2:] == ["–", "–"], "an evaluation of an earlier step is not the end"


def test_the_sentences_follow_from_the_numbers(runs: list[RunRecord]) -> None:
    text = explanation(runs, processes=2)
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    assert "from text to zero-shot perplexity, on 2 processes" in text
    assert "It does not show which optimizer is better: each has one seed, 1.1 million parameters and 400 steps" in text
    assert (
        "LION comes last in ln perplexity, 0.069 nats behind AdamW; two runs of one setting differed by up to 0.08."
        in text
    )
    assert "on one process" in " ".join(explanation(runs, processes=1).split())
    assert "the paper's rates are made for 50,000 steps" in " ".join(
        explanation(runs[:2], processes=2, paper_rates=True).split()
    )
    quick = " ".join(explanation(runs, processes=2, quick=True).split())
    assert "nothing about the optimizers" in quick
    assert "comes last" not in quick


def test_the_next_commands_are_indented_and_nothing_else_is() -> None:
    lines = next_steps(Path("demo"), "configs/demo.yaml", 2).splitlines()
    assert [line.split(" ")[4] for line in lines if line.startswith("  ")]
    assert all(" -m megatron_lion" in line for line in lines if line.startswith(" "))
    assert "demo/comparison/report.html" in lines[0]
    *_, pages = lines
    assert all(Path(page).is_file() for page in pages.removeprefix("To read: ").split(", "))


def test_the_corpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--only-corpus writes two files, keeps equal ones, and replaces no others."""
    small = build_demo_corpus(tmp_path / "expected", max_train_bytes=100_000)
    defaults: Any = (100_000,)
    monkeypatch.setattr(build_demo_corpus, "__defaults__", defaults)
    words = ["demo", "--only-corpus", "--output", str(tmp_path / "text")]
    for _ in range(2):
        assert main(words) == 0
        assert {path.name for path in (tmp_path / "text").iterdir()} == {"train.jsonl", "held_out.txt"}
        assert (tmp_path / "text" / "train.jsonl").read_bytes() == small.train.read_bytes()
        assert (tmp_path / "text" / "held_out.txt").read_bytes() == small.held_out.read_bytes()
    (tmp_path / "text" / "held_out.txt").write_text("mine")
    capsys.readouterr()
    assert main(words) == 2
    assert "held_out.txt: exists with other content; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "text" / "held_out.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="exists with other content"):
        build_demo_corpus(tmp_path / "text")
    for flag in (["--quick"], ["--processes", "2"], ["--paper-rates"]):
        assert main([*words, *flag]) == 2
        assert f"trains nothing; omit {flag[0]}" in capsys.readouterr().err
