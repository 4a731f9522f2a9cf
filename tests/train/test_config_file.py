"""Configs are read back as written, and all mistakes in a file are reported with their lines."""

from __future__ import annotations

import dataclasses
import errno
import os
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st
from properties import examples

from megatron_lion import config as config_module
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config, known_keys, load_config, save_config
from megatron_lion.errors import ConfigError, StorageError

TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12)
AWKWARD = [
    "no",
    "yes",
    "1e-4",
    "0x10",
    "a: b",
    "#x",
    "a #b",
    "~",
    "- #",
    "1_000",
    "2024-01-01",
    " lead",
    "NULL",
    "Null",
    " null",
]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Returns a strategy for any value of a field's type, including awkward ones."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return configs_of(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(values_of(argument) for argument in arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*(values_of(argument) for argument in arguments))
    if kind is type(None):
        return st.none()
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**40), 2**40),
        float: st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1e-4, 1e-5, 6e-4, 1e22, 1.0])),
        # A setting's text null is null also in quotes: it cannot be distinguished from the flag's `--log.wandb_project null`.
        str: st.one_of(TEXT, st.sampled_from(AWKWARD)).filter(lambda text: text.strip() != "null"),
    }  # fmt: skip
    return simple[kind]


def configs_of(kind: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, vars(config_module))
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})


@examples(25, phases=[Phase.generate])  # a config is as small as it gets
@given(configs_of(RunConfig))
def test_dump_and_load_give_the_same_config(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_field_is_a_flag_with_a_text() -> None:
    from megatron_lion.cli import build_parser
    from megatron_lion.commands import pretrain

    text = " ".join(build_parser("pretrain", pretrain).format_help().split())
    for key in known_keys():
        if "." in key:
            section, name = key.split(".")
            kind = typing.get_type_hints(RunConfig, vars(config_module))[section]
            assert f"--{key} " in text
            assert dataclasses.fields(kind), name


def test_overrides_win_and_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  lr: 1e-4\n  betas: [0.9, 0.98]\n")
    config = load_config(path, ["--optimizer.lr", "3e-5", "--model.num_layers=3"])
    assert (config.optimizer.lr, config.optimizer.betas, config.model.num_layers) == (3e-5, (0.9, 0.98), 3)
    assert load_config(path).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", ["line 3: key 'train.steps' is given twice"]),
        ("seed: 1\nseed: 1\n", ["line 2: key 'seed' is given twice"]),
        ("optimizer:\n  lrr: 1\n", ["line 2: there is no key 'optimizer.lrr' (did you mean optimizer.lr?)"]),
        ("optimzer: {lr: 1}\n", ["line 1: there is no key 'optimzer' (did you mean optimizer?)"]),
        ("lr: 1\n", ["there is no key 'lr' (did you mean optimizer.lr?)"]),
        ("train: 5\n", ["line 1: train is a group of settings"]),
        ("a: 1\nmodel:\n  c: 3\n", ["line 1: there is no key 'a'", "line 3: there is no key 'model.c'"]),
        ("train:\n  steps: many\n", ["train.steps: expected int, given many"]),
        ("optimizer:\n  name: no\n", ["optimizer.name: expected one of 'lion', 'sgd', 'adamw'"]),
        ("data:\n  path: [1\n", ["line 3: not valid YAML"]),
        ("- 1\n", ["expected settings as 'key: value'"]),
        ("", ["expected settings as 'key: value'"]),
        ("model: !!python/object/apply:os.system ['touch /tmp/ran']\n", ["model is a group of settings"]),
        ("name: !!python/object/apply:os.system ['touch /tmp/ran']\n", ["python/object"]),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert len(message.splitlines()) == len(expected)
    for part in expected:
        assert part in message
    assert "Traceback" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError):
        load_config(tmp_path)


def test_settings_reach_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash config.yaml is the old one or the new one: checkpoints are of no use without it."""
    path = tmp_path / "config.yaml"
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append(f"fsync {'folder' if os.path.samestat(os.fstat(handle), os.stat(tmp_path)) else 'file'}")
        fsync(handle)

    def noted_replace(*names: Any) -> None:
        events.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    config = RunConfig(name="first")
    save_config(config, path)
    assert events == ["fsync file", "replace", "fsync folder"]
    assert load_config(path) == config

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"config\.yaml: cannot be written: No space left on device"):
        save_config(RunConfig(name="second"), path)
    assert load_config(path) == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
