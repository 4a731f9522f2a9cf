"""What a family trains: shapes, rates by width, flags of its runs, and refused values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lion.cli import build_parser, main, parse, verb_module
from megatron_lion.configfile import load_config
from megatron_lion.model.sizes import model_size
from megatron_lion.reproduce.sources import Sources
from megatron_lion.scaling.family import DEFAULTS, Family, Shape, family_of
from megatron_lion.scaling.family_steps import all_steps, config_path


def family(scale: Any = "tiny", **given: Any) -> Family:
    return family_of({"noise_share": 0.05, **given}, scale)


def test_rates_are_those_of_the_base_width_and_scale_with_it() -> None:
    """LION and AdamW in proportion to 1/width, SGD constant; the tuned rates are those at width 128."""
    found = {(run.recipe.optimizer, run.shape.width): run.recipe for run in family(seeds="1").runs()}
    assert [found["lion", width].lr for width in (32, 128, 256)] == [1.2e-3, 3e-4, 1.5e-4]
    assert [found["adamw", width].lr for width in (32, 128, 256)] == [4e-3, 1e-3, 5e-4]
    assert [found["sgd", width].lr for width in (32, 128, 256)] == [0.3, 0.3, 0.3]
    assert {recipe.weight_decay for (name, _), recipe in found.items() if name == "lion"} == {0.1}


def test_given_rates_and_another_base_width() -> None:
    made = family(widths="16,32,64,128", optimizers="sgd,lion", lr="lion=1e-3", base_width=32, seeds="5")
    found = {(run.recipe.optimizer, run.shape.width): run.recipe.lr for run in made.runs()}
    assert [found["lion", width] for width in (16, 32, 64, 128)] == [2e-3, 1e-3, 5e-4, 2.5e-4]
    assert found["sgd", 16] == 0.3
    assert [run.seed for run in made.runs()] == [5] * 8


def test_models_differ_in_size_alone(tmp_path: Path) -> None:
    """The flags of each run give the d of `model_size`, one head size, and equal data, steps and batches."""
    made = family(widths="32,48,64", depths="2,4", seeds="1,2", optimizers="lion")
    sources = Sources((), None, None, None, tmp_path)
    steps = [step for step in all_steps(made, sources) if step.verb == "pretrain"]
    assert len(steps) == 3 * 2 * 2
    sizes = set()
    for step in steps:
        parse(build_parser("pretrain", verb_module("pretrain")), list(step.words))
        config = load_config(step.words[1], list(step.words[2:]))
        assert config.model.hidden_size // config.model.num_attention_heads == 16
        assert (config.train.steps, config.train.global_batch_size, config.model.seq_length) == (400, 8, 128)
        assert (config.probe.every, config.probe.num_batches, config.checkpoint.at_steps) == (200, 32, [200, 400])
        sizes.add(model_size(config.model, 2048).num_parameters)
    assert len(sizes) == 6
    assert len({step.words[step.words.index("--run_dir") + 1] for step in steps}) == len(steps)


def test_the_defaults_span_a_decade_of_d() -> None:
    made = family()
    base = load_config(config_path(made)).model
    sizes = [model_size(made.model(shape, base), 2048).num_parameters for shape in made.shapes]
    assert sizes[0] == 120_512
    assert sizes[-1] == 3_716_608
    assert made.shapes[0] == Shape(width=32, depth=4)


WRONG = {
    "--optimizers lion,adam": "'adam' is not an optimizer; expected some of lion, ",
    "--optimizers lion,lion": "an optimizer is given twice",
    "--widths 64": "one model has no exponent",
    "--widths 32,40": "40 is not a multiple of the head size 16",
    "--widths 32,32": "a number is given twice",
    "--widths 32,x": "expected whole numbers",
    "--depths 0": "expected whole numbers of at least 1",
    "--seeds 1,-2": "expected whole numbers",
    "--head-size 0": "must be at least 1",
    "--steps 0": "must be at least 1",
    "--lr lion:1": "expected OPTIMIZER=RATE",
    "--lr lion=-1": "expected OPTIMIZER=RATE",
    "--noise-share 1.5": "must be between 0 and 1",
    "--measure-at 401": "401 is after the last step, 400",
    "--measure-at 1,400": "the steps' common divisor, which are 400 in 400 steps",
    "--first-batches 4": "must be at least 8",
    "--max-batches 16": "at least the 32 batches of the first probe",
    "--processes 3": "must be 1 or 2",
    "--scale full": "needs --text and --tokenizer",
}


@pytest.mark.parametrize("words", sorted(WRONG))
def test_a_wrong_value_is_one_line_that_begins_with_its_flag(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    # --dry-run: without the check that is tested, nothing would be trained
    assert main(["scaling", *words.split(), "--output", str(output), "--dry-run"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.removeprefix("megatron-lion: ").removeprefix("error: ").startswith(words.split()[0]), message
    assert WRONG[words] in message
    assert len(message.splitlines()) == 1
    assert not output.exists()


def test_a_dry_run_writes_nothing_and_states_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--widths", "32,64", "--seeds", "1", "--optimizers", "lion", "--output", str(tmp_path / "out")]
    assert main(["scaling", *words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    # 2 runs of 400 steps of 8 × 128 tokens; 3 probes of 32 batches, and at most 256 at two of the steps
    for number in ("120,512", "339,328", "819,200 tokens", "196,608 tokens", "1,048,576 tokens"):
        assert number in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", sorted(DEFAULTS))
def test_printed_commands_are_those_of_the_plan(scale: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text", "a.jsonl", "--tokenizer", "gpt2"] if scale == "full" else []
    assert main(["scaling", "--scale", scale, *words, "--output", "out", "--print"]) == 0
    text = capsys.readouterr().out
    sources = Sources(tuple(words[1:2]), "gpt2" if words else None, None, None, Path("out"))
    for step in all_steps(family(scale), sources):
        assert f"# {step.title}\n{step.shown(2)}\n" in text
        if step.verb != "pretrain":
            parse(build_parser(step.verb, verb_module(step.verb)), list(step.words))
    assert ("torchrun.sh" in text) == (scale == "full")
    assert text.count("--num-batches 1000") == (14 if scale == "full" else 0)


def test_the_full_scale_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["--scale", "full", "--text", "a.jsonl", "--tokenizer", "gpt2", "--output", str(output)]
    assert main(["scaling", *words]) == 4
    assert "--print shows the commands" in capsys.readouterr().err
    assert not output.exists()
