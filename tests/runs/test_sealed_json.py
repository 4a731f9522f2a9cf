"""run.json, environment.json, probe and evaluation results: damage and values of another type are refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.errors import CheckpointError
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.runs.sealed_json import read_sealed, write_sealed

SEALED = ["run.json", "environment.json", "eval/wikitext103-step_0000200.json"]


def sealed_run(folder: Path) -> Path:
    write_run(folder)
    for name in SEALED:
        write_sealed(folder / name, json.loads((folder / name).read_text()))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"format": 1, "name": "λ", "rates": (0.1, 1e-9), "by step": {10: 1.5, 2: None}, "is": True}
    write_sealed(tmp_path / "it.json", content)
    assert read_sealed(tmp_path / "it.json") == json.loads(json.dumps(content))
    assert len(json.loads((tmp_path / "it.json").read_text())["sha256"]) == 64


def refusal(folder: Path, right: RunRecord) -> str:
    """The message with which a run is refused; "" if it is read as before (the flip was in white space)."""
    try:
        found = read_run(folder)
    except CheckpointError as error:
        return str(error)
    assert found == right
    return ""


@pytest.mark.parametrize("name", SEALED)
def test_every_flipped_bit_is_found_or_harmless(name: str, tmp_path: Path) -> None:
    folder = sealed_run(tmp_path / "run")
    right = read_run(folder)
    path, chance = folder / name, random.Random(1)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        message = refusal(folder, right)
        if message:
            assert str(path) in message
            assert "\n" not in message
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("text", ["", "[1]", "{", "nul\0", '{"a": 1e5', "[" * 100_000, '"x"', "9" * 9999])
@pytest.mark.parametrize("name", SEALED)
def test_what_is_no_object_is_named(name: str, text: str, tmp_path: Path) -> None:
    folder = sealed_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        read_run(folder)
    assert str(refusal.value).startswith(f"{folder / name}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [{"a": 1}, True, "12", 1.5], ids=repr)
@pytest.mark.parametrize(
    ("name", "key"),
    [("run.json", "name"), ("run.json", "optimizer"), ("run.json", "world_size"), ("run.json", "tokenizer_sha256"),
     (SEALED[2], "kind"), (SEALED[2], "step"), (SEALED[2], "text_sha256"), (SEALED[2], "n_orig"), (SEALED[2], "stride"),
     (SEALED[2], "token_ppl"), (SEALED[2], "log_token_ppl"), ("config.yaml", "seed"), ("config.yaml", "name")],
)  # fmt: skip
def test_a_value_of_another_type_is_named(name: str, key: str, value: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / name
    if path.suffix == ".yaml":
        path.write_text(f"{path.read_text()}\n{key}: {json.dumps(value)}\n")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    if (isinstance(value, str) and key in TEXTS) or (key.endswith("_ppl") and value == 1.5):
        read_run(folder)
        return
    with pytest.raises(CheckpointError, match=rf"({key} must be|not an evaluation result)") as refusal:
        read_run(folder)
    assert str(refusal.value).startswith(f"{path}: ")


def test_the_command_ends_with_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text('{"name": ["a"]}')
    assert main(["compare", str(folder), "--output", str(tmp_path / "out"), "--no-figures"]) == 4
    assert capsys.readouterr().err == f"megatron-lion: {folder / 'run.json'}: name must be a text, got ['a']\n"


TEXTS = {"name", "optimizer", "tokenizer_sha256", "kind", "text_sha256"}


def test_a_change_on_purpose_has_a_way(tmp_path: Path) -> None:
    folder = sealed_run(tmp_path / "run")
    path = folder / "run.json"
    path.write_text(path.read_text().replace("gpt2-small", "gpt2-other"))
    with pytest.raises(CheckpointError, match=r"run.json: does not match its own sha256.*remove its line \"sha256\""):
        read_run(folder)
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert read_run(folder).model == "gpt2-other"
