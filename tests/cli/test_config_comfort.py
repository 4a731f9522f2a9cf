"""Configs by name, short forms of values, suggestions for other programs' names, comments, schema and shell completion."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_lion.cli import main
from megatron_lion.config import RunConfig
from megatron_lion.config_hints import FOREIGN, suggest
from megatron_lion.configfile import dump_config, known_keys, load_config
from megatron_lion.setting_texts import commented, json_schema, settings
from megatron_lion.shipped import shipped_configs

REPO = Path(__file__).resolve().parents[2]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict, str]:
    """The settings that `pretrain --print_config` prints, and stderr."""
    assert main(["pretrain", *words, "--print_config"]) == 0
    out, err = capsys.readouterr()
    return yaml.safe_load(out), err


@pytest.mark.parametrize("name", ["gpt2-tiny", "gpt2_tiny", "gpt2_tiny.yaml"])
@pytest.mark.parametrize("form", ["first", "flag", "flag="])
def test_a_shipped_config_is_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"first": [name], "flag": ["--config", name], "flag=": [f"--config={name}"]}[form]
    content, _ = printed(capsys, *words, "--train.steps", "7", "--schedule.warmup_steps", "2")
    assert (content["name"], content["model"]["hidden_size"], content["train"]["steps"]) == ("gpt2-tiny", 128, 7)


def test_a_file_of_the_user_wins_over_a_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2-tiny").write_text("name: mine\n")
    assert printed(capsys, "gpt2-tiny")[0]["name"] == "mine"


def test_an_unknown_config_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "gpt2-tony"]) == 2
    error = capsys.readouterr().err
    assert "config file gpt2-tony does not exist" in error
    assert all(path.stem.replace("_", "-") in error for path in (REPO / "configs").glob("*.yaml"))
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--data.path", "data/owt"], "data.path", ["data/owt"]),
        (["--data.path=data/owt"], "data.path", ["data/owt"]),
        (["--data.path", "a, b: c"], "data.path", ["a, b: c"]),
        (["--data.path", "no"], "data.path", ["no"]),
        (["--data.path", '["x", y]'], "data.path", ["x", "y"]),
        (["--data.path", "[]"], "data.path", []),
        (["--checkpoint.at_steps", "5"], "checkpoint.at_steps", [5]),
        (["--checkpoint.at_steps", "5,10"], "checkpoint.at_steps", [5, 10]),
        (["--data.weights", "null"], "data.weights", None),
    ],
)
def test_one_value_is_a_list_of_one(
    capsys: pytest.CaptureFixture[str], words: list[str], key: str, value: object
) -> None:
    section, name = key.split(".")
    assert printed(capsys, "gpt2-tiny", *words)[0][section][name] == value


def test_one_value_is_a_list_of_one_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: data/owt, weights: 2}\ncheckpoint:\n  at_steps: 5\n")
    config = load_config(path)
    assert (config.data.path, config.data.weights, config.checkpoint.at_steps) == (["data/owt"], [2.0], [5])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--learning_rate", "1"], "--learning_rate (did you mean --optimizer.lr?)"),
        (["--learning-rate=1"], "--learning-rate (did you mean --optimizer.lr?)"),
        (["--lr", "1"], "--lr (did you mean --optimizer.lr?)"),
        (["--train.lr", "1"], "--train.lr (did you mean --optimizer.lr?)"),
        (["--batch_size", "8"], "--batch_size (did you mean --train.global_batch_size?)"),
        (["--max_steps", "8"], "--max_steps (did you mean --train.steps?)"),
        (["--num-layers", "8"], "--num-layers (did you mean --model.num_layers?)"),
        (["--bf16", "--foo"], "--bf16 (did you mean --train.precision bf16?), --foo"),
        (["--optimizer.lrr", "8"], "--optimizer.lrr (did you mean --optimizer.lr?)"),
        (["--train.step", "8"], "--train.step (did you mean --train.steps?)"),  # no abbreviations
        (["--cross-entropy-loss-fusion"], "--cross-entropy-loss-fusion (did you mean --model.loss?)"),
    ],
)
def test_unknown_flags_are_answered_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], words: list[str], meant: str
) -> None:
    assert main(["pretrain", "gpt2-tiny", *words, "--dry-run"]) == 2
    assert capsys.readouterr().err == f"megatron-lion: unknown flag {meant}\n"


def test_suggestions_are_flags_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run", "--wikitext", "x", "--learning_rate", "3"]) == 2
    error = capsys.readouterr().err
    assert error == "megatron-lion: unknown flag --wikitext (did you mean --wikitext103?), --learning_rate\n"
    assert main(["compare", "run", "--out", "x"]) == 2
    assert "--out (did you mean --output?)" in capsys.readouterr().err


def test_foreign_names_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1\ntrain:\n  batch_size: 3\n  max_steps: 4\n")
    assert main(["pretrain", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    for line, key, meant in ((1, "learning_rate", "optimizer.lr"), (3, "train.batch_size", "train.global_batch_size"),
                             (4, "train.max_steps", "train.steps")):  # fmt: skip
        assert f"line {line}: there is no key '{key}' (did you mean {meant}?)" in error


def test_every_foreign_name_leads_to_a_setting() -> None:
    known = known_keys()
    for name, meant in FOREIGN.items():
        assert name == name.lower().replace("-", "_")
        assert meant.startswith("--") or meant.split(" ")[0] in known, name
        assert name not in known, name
    assert suggest("n_embd", known) == "model.hidden_size"
    assert suggest("qwertz", known) is None


def test_printed_config_has_the_help_of_each_setting_and_is_read_back(tmp_path: Path) -> None:
    config = RunConfig(name="a: #b", run_dir="x\ny")  # quoted, and over several lines
    text = commented(dump_config(config))
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_config(path) == config
    comments = " ".join(line.strip().lstrip("# ") for line in text.splitlines() if line.strip().startswith("#"))
    for setting in settings():
        assert setting.text, setting.key
        assert setting.text in comments, setting.key
    lines = text.splitlines()
    place = lines.index("  lr: 0.0001")
    assert lines[place - 1] == "  # Peak learning rate. LION needs a rate 3-10 x smaller than AdamW's."
    assert max(map(len, lines)) <= 100


def test_schema_accepts_the_shipped_configs_and_rejects_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    for path in shipped_configs().values():
        assert not list(validator.iter_errors(yaml.safe_load(path.read_text()))), path
    assert not list(validator.iter_errors(yaml.safe_load(dump_config(RunConfig()))))
    assert not list(validator.iter_errors({"data": {"path": "x"}, "optimizer": {"lr": "1e-4"}}))
    for wrong in ({"lr": 1}, {"optimizer": {"name": "adam"}}, {"train": {"steps": 1.5}}, {"optimizer": {"lr": "fast"}},
                  {"optimizer": {"betas": [0.9]}}, {"model": 3}):  # fmt: skip
        assert list(validator.iter_errors(wrong)), wrong


def test_committed_schema_is_that_of_the_code() -> None:
    assert (REPO / "configs" / "schema.json").read_text() == json_schema()
    for path in (REPO / "configs").glob("*.yaml"):
        assert "# yaml-language-server: $schema=schema.json" in path.read_text().splitlines()[:6], path


COMPLETE = """
eval "$SCRIPT"
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_shtab_megatron_lion megatron-lion "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_verbs_flags_choices_and_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "gpt2-mine.yaml").touch()

    def completed(*words: str) -> set[str]:
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "bash", "megatron-lion", *words],
            cwd=tmp_path, env={"SCRIPT": script, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return set(done.stdout.split())

    assert completed("pre") == {"prepare", "pretrain"}
    assert completed("pretrain", "--optimizer.name", "") == {"lion", "sgd", "adamw"}
    assert "--optimizer.weight_decay" in completed("pretrain", "--optimizer.w")
    names = {path.stem.replace("_", "-") for path in (REPO / "configs").glob("gpt2*.yaml")} | {"gpt2-mine.yaml"}
    assert completed("pretrain", "gpt2") == names
    assert completed("pretrain", "--config", "gpt2") == names
    assert completed("compare", "gpt2-m") == {"gpt2-mine.yaml"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    assert "megatron-lion" in capsys.readouterr().out
