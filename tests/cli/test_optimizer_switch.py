"""A rate that was chosen for one optimizer is not used for another without a note."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiny import write_corpus

from megatron_lion.cli import main
from megatron_lion.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_lion.configfile import load_config, save_config
from megatron_lion.runs.folder import differences
from megatron_lion.runs.identity import _different, deciding_settings
from megatron_lion.shipped import shipped_configs
from megatron_lion.sweep.grid import parse_grids
from megatron_lion.sweep.plan import plan_runs


@pytest.mark.parametrize(
    ("words", "rate", "decay", "noted"),
    [
        (["--optimizer.name", "lion"], 3e-4, 0.1, ""),
        (["--optimizer.name", "sgd"], 0.3, 0.0, "become 0.3 and 0;"),
        (["--optimizer.name=adamw"], 9e-4, 0.1 / 3, "become 0.0009 and 0.0333333;"),
        (["--optimizer.name", "sgd", "--optimizer.weight_decay", "0.01"], 0.3, 0.01, "become 0.3 and 0.01;"),
        (["--optimizer.name", "sgd", "--optimizer.lr", "0.1"], 0.1, 0.1, "weight_decay 0.1 is that of gpt2-tiny for lion and stays"),
        (["--optimizer.name", "sgd", "--optimizer.lr=0.1", "--optimizer.weight_decay=0.2"], 0.1, 0.2, ""),
        (["--optimizer", "{name: sgd}"], 3e-4, 0.1, ""),  # a whole group is taken as it is
    ],
)  # fmt: skip
def test_flags_that_change_the_optimizer(
    capsys: pytest.CaptureFixture[str], words: list[str], rate: float, decay: float, noted: str
) -> None:
    assert main(["pretrain", "gpt2-tiny", *words, "--print_config"]) == 0
    out, err = capsys.readouterr()
    optimizer = yaml.safe_load(out)["optimizer"]
    assert float(optimizer["lr"]) == pytest.approx(rate, rel=1e-6)
    assert float(optimizer["weight_decay"]) == pytest.approx(decay, rel=1e-5)
    assert (noted in err) if noted else not err


def test_default_settings_are_converted_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--optimizer.name", "sgd", "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["optimizer"]["lr"] == 0.1
    assert "the default config has lr 0.0001" in err


def test_one_note_for_all_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["pretrain", "gpt2-tiny", "--optimizer.name", "sgd", "--print_config"]) == 0
    assert not capsys.readouterr().err


def test_a_sweep_over_optimizers_converts_and_its_commands_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpus(tmp_path / "c_text_document")
    base = load_config(shipped_configs()["gpt2-tiny"], ["--data.path", data])
    runs = plan_runs(base, parse_grids(["optimizer.name=lion,sgd", "seed=1,2"]), tmp_path / "sweep", 1)
    assert [(run.config.optimizer.name, run.config.optimizer.lr) for run in runs] == [
        ("lion", 3e-4), ("lion", 3e-4), ("sgd", 0.3), ("sgd", 0.3)]  # fmt: skip
    assert capsys.readouterr().err.count("note:") == 1
    file = tmp_path / "base.yaml"
    save_config(base, file)
    for run in runs:  # what the child process reads is what was planned
        assert main(["pretrain", *run.words(file), "--print_config"]) == 0
        out, err = capsys.readouterr()
        path = tmp_path / "child.yaml"
        path.write_text(out)
        assert load_config(path) == run.config
        assert not err


def test_null_betas_are_saved_and_compared_as_their_values() -> None:
    config = RunConfig()
    assert config.optimizer.betas is None
    saved = config.resolved()
    assert (saved.optimizer.betas, saved.model.ffn_hidden_size) == ((0.9, 0.95), 3072)
    assert not differences(config, saved)
    assert not differences(saved, config)
    assert differences(config, RunConfig(optimizer=OptimizerConfig(betas=(0.9, 0.99))))
    assert deciding_settings(config)["optimizer.betas"] == [0.9, 0.95]


def test_a_checkpoint_of_an_earlier_version_has_null_for_these() -> None:
    config = dataclasses.replace(RunConfig(), model=ModelConfig(hidden_size=128, num_attention_heads=4))
    settings = deciding_settings(config)
    older = {**settings, "optimizer.betas": None, "model.ffn_hidden_size": None}
    manifest = {"state_layout": "fully_reshardable", "step": 0, "consumed_samples": 0, "settings": older}
    assert not _different(manifest, settings)
    other = {**settings, "optimizer.betas": [0.9, 0.99], "model.ffn_hidden_size": 300}
    assert _different(manifest, other) == [
        "model.ffn_hidden_size: 512, now 300", "optimizer.betas: [0.9, 0.95], now [0.9, 0.99]"]  # fmt: skip
