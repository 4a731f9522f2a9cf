"""What a plan makes before the first training, and the numbers of processes that can train."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.cli import main
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import load_config
from megatron_lion.errors import ConfigError
from megatron_lion.reproduce.artefacts import build_plan
from megatron_lion.reproduce.recipes import possible_processes
from megatron_lion.reproduce.sources import Sources, note_text
from megatron_lion.shipped import shipped_folder

FULL = {"text": ("a.jsonl",), "tokenizer": "gpt2", "vocab": "vocab.txt", "wikitext103": "wiki.test.tokens"}
NOTHING: dict[str, Any] = {"text": (), "tokenizer": None, "vocab": None, "wikitext103": None}


@pytest.mark.parametrize(
    ("given", "artefact", "made"),
    [
        ({}, "table-b1", ["text", "bpe"]),
        ({}, "figure-2", ["text", "wordpiece"]),
        ({}, "rates", ["text", "bpe"]),
        ({"text": ("a.jsonl",)}, "table-b1", ["text", "bpe"]),  # the held-out text is evaluated
        ({"text": ("a.jsonl",), "wikitext103": "wiki"}, "table-b1", ["bpe"]),
        ({"text": ("a.jsonl",)}, "figure-3", ["bpe"]),
        ({"text": ("a.jsonl",), "tokenizer": "gpt2"}, "figure-3", []),
        ({"text": ("a.jsonl",), "tokenizer": "gpt2"}, "figure-2", ["wordpiece"]),
        ({"vocab": "vocab.txt"}, "figure-2", ["text"]),
        ({}, "toy", []),
    ],
)
def test_a_plan_makes_what_is_not_given_and_needed(given: dict[str, Any], artefact: str, made: list[str]) -> None:
    plan = build_plan(artefact, "tiny", Sources(**{**NOTHING, **given}, output=Path("out")))
    found = [step for step in plan.steps if step.makes is not None]
    assert [step.makes.parent.name for step in found if step.makes is not None] == made
    training = [step for step in found if step.verb == "tokenizer"]
    text = given.get("text", ("out/text/train.jsonl",))
    assert all(step.words[step.words.index("--input") + 1] == text[0] for step in training)


def test_the_text_is_recorded_before_anything_is_made_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another text in the same folder is refused, although its vocabulary exists."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        path.write_text(json.dumps({"text": path.name}) + "\n")
    output = tmp_path / "out"
    note_text(Sources(**{**NOTHING, "text": (str(one),)}, output=output))
    (output / "bpe").mkdir()
    (output / "bpe" / "merges.txt").write_text("made from the first text")
    assert main(["reproduce", "figure-3", "--text", str(two), "--output", str(output)]) == 2
    assert "contains a reproduction from other text" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == {"bpe", "text.sha256"}


# global batch 8 and micro-batch 4 of all three configs: a process takes a multiple of 4 of the 8 samples
SMALL = {"demo.yaml": [1, 2], "demo_paper_rates.yaml": [1, 2], "bert_demo.yaml": [1, 2]}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_possible_numbers_of_processes_are_those_that_pretrain_accepts(name: str) -> None:
    config = load_config(shipped_folder("configs") / name)
    accepted = []
    for number in range(1, 33):
        with contextlib.suppress(ConfigError):
            check_config(config, number)
            accepted.append(number)
    assert possible_processes(config) == accepted == SMALL[name]


@pytest.mark.parametrize(
    ("batch", "micro", "tp", "numbers"), [(12, 2, 1, [1, 2, 3, 6]), (16, 1, 2, [2, 4, 8, 16, 32]), (7, 2, 1, [])]
)
def test_possible_numbers_are_computed_from_the_config(batch: int, micro: int, tp: int, numbers: list[int]) -> None:
    config = load_config(
        shipped_folder("configs") / "demo.yaml",
        ["--train.global_batch_size", str(batch), "--train.micro_batch_size", str(micro),
         "--parallel.tensor_model_parallel_size", str(tp)],
    )  # fmt: skip
    assert possible_processes(config) == numbers


@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["demo", "--paper-rates"],
        ["reproduce", "figure-2"],
        ["reproduce", "table-b1", "figure-2", "toy", "--print"],
    ],
)
def test_every_recommended_number_works(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "3", "4", "8", "16"):
        assert main([*words, "--processes", wrong, "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"--processes {wrong}: must be 1 or 2, because " in message
        assert "in micro-batches of 4" in message
    assert not (tmp_path / "out").exists()


def test_the_full_scale_evaluates_on_any_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        word for key, value in FULL.items() for word in (f"--{key}", value if isinstance(value, str) else value[0])
    ]
    assert main(["reproduce", "table-b1", "--scale", "full", *words, "--processes", "3", "--print"]) == 0
    assert "-m megatron_lion.launcher --processes 3 evaluate " in capsys.readouterr().out
    assert main(["reproduce", "table-b1", "--scale", "full", *words, "--processes", "0", "--print"]) == 2
    assert "--processes 0: must be at least 1" in capsys.readouterr().err


def test_the_help_states_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Figure 1 (image classifiers) is missing" in text
    assert "figure-1 is not reproduced" in text


def test_the_page_opens_with_the_answer() -> None:
    lines = (shipped_folder("configs").parent / "docs" / "reproduction.md").read_text().splitlines()
    assert lines[2].startswith("**The answer.**")
    assert any("Figure 1" in line and "missing" in line for line in lines[:9])
    assert all(len(line) <= 120 for line in lines if line.startswith("|"))
