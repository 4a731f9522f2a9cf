"""Models that were evaluated but not trained here are rows of the perplexity tables."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main


def result(folder: Path, name: str, **changes: Any) -> None:
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    state = state_of(folder) if (folder / "config.json").exists() else "a" * 64
    record = {
        "format": 1, "kind": "wikitext103", "step": 0, "text_path": "wiki.test.tokens", "text_sha256": "e" * 64,
        "text_version": "WikiText-103 tokens test", "stride": 32, "seq_length": 1024, "precision": "fp32", "max_tokens": None,
        "tokenizer_sha256": "t" * 64, "state_sha256": state, "loss": 3.25, "token_ppl": 25.8, "log_token_ppl": 3.25,
        "adjusted_ppl": 30.0, "log_adjusted_ppl": 3.4, "n_orig": 245_566, "n_tok": 270_330, "num_targets": 270_329, "start_id": None,
        "versions": {"torch": "2"}, **changes,
    }  # fmt: skip
    (folder / "eval" / f"{name}-step_0000000.json").write_text(json.dumps(record))


def published(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return folder


def state_of(folder: Path) -> str:
    """The hash of a Hugging Face folder in the form of sha256sum's output."""
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def imported(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "name: gpt2\nmodel: {kind: gpt2, seq_length: 1024}\noptimizer: {name: lion, lr: 0.1}\n"
    )
    return folder


def table(folder: Path, name: str) -> list[list[str]]:
    return list(csv.reader((folder / f"{name}.csv").read_text().splitlines()))


def test_published_and_imported_models_are_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "lion"), write_run(tmp_path / "sgd", optimizer="sgd")]
    hub, own = published(tmp_path / "gpt2-hub"), imported(tmp_path / "gpt2-import")
    result(hub, "wikitext103")
    result(own, "wikitext103", log_token_ppl=3.5)
    output = tmp_path / "out"
    assert main(["compare", *map(str, [*runs, hub, own]), "--output", str(output), "--no-figures"]) == 0
    head, *rows = table(output, "log-perplexity")
    assert head == ["model", "optimizer", "200", "400", "600", "800", "1k", "reference"]
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert found["gpt2-hub", "reference"] == ["", "", "", "", "", "3.25"]
    assert found["gpt2-import", "reference"][-1] == "3.5"
    assert found["gpt2-small", "LION"][-1] == ""
    assert "" not in found["gpt2-small", "LION"][:-1]
    for name in ("losses", "cost"):
        assert [row[0] for row in table(output, name)[1:]] == ["gpt2-small", "gpt2-small"], name
    assert "gpt2-hub" in (output / "report.html").read_text()
    capsys.readouterr()
    assert main(["compare", *map(str, [*runs, hub]), "--best", "--output", str(output), "--no-figures"]) == 0
    assert "gpt2-hub" in capsys.readouterr().out


def test_references_alone_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = published(tmp_path / "one"), published(tmp_path / "other")
    for folder in (one, other):
        result(folder, "wikitext103")
        result(folder, "lambada", kind="lambada", stride=None, accuracy=0.3, word_ppl=40.0, log_word_ppl=3.7, n_passages=5153,
               last_token_accuracy=0.46, last_token_ppl=20.0)  # fmt: skip
    assert main(["compare", str(one), str(other), "--output", str(tmp_path / "out")]) == 0
    assert table(tmp_path / "out", "log-perplexity")[0] == ["model", "optimizer", "reference"]
    assert "46.00%" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["megatron-bert", "bert", "llama"])
def test_a_model_that_evaluate_cannot_measure_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    hub = published(tmp_path / "hub")
    (hub / "config.json").write_text(json.dumps({"model_type": kind}))
    assert main(["compare", str(hub), "--output", str(tmp_path / "out")]) == 4
    error = capsys.readouterr().err
    assert f"{hub}: a Hugging Face model of type {kind}; " in error
    assert "measures gpt2 folders only; remove it from the command" in error
    assert "--wikitext103" not in error
    assert error.count("\n") == 1


def test_a_folder_without_results_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = published(tmp_path / "hub")
    assert main(["compare", str(hub), "--output", str(tmp_path / "out")]) == 4
    assert f"first measure it, for example: megatron-lion evaluate {hub} --wikitext103 FILE" in capsys.readouterr().err
    assert main(["compare", str(imported(tmp_path / "own")), "--output", str(tmp_path / "out")]) == 4
    assert "has no metrics.jsonl" in capsys.readouterr().err
    # A run that lost its metrics is no reference, because it has results of later steps.
    result(tmp_path / "own", "wikitext103", step=10)
    assert main(["compare", str(tmp_path / "own"), "--output", str(tmp_path / "out")]) == 4
