"""The runs that may be compared, and their labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from synthetic_runs import write_run

from megatron_lion.compare.budgets import loss_tables
from megatron_lion.compare.labels import differing_settings, seed_groups, setting_names, with_labels
from megatron_lion.compare.seeds import seeds_table
from megatron_lion.compare.selection import read_runs
from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.record import read_run


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = read_runs(
        [
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", lr=5e-4),
            write_run(tmp_path / "c", optimizer="sgd"),
            write_run(tmp_path / "d", model="gpt2-medium"),
        ]
    )
    assert [run.label for run in runs] == ["LION lr=0.001", "LION lr=0.0005", "SGD", "LION"]
    same = read_runs([write_run(tmp_path / "e"), write_run(tmp_path / "f")])
    assert [run.label for run in same] == ["LION e", "LION f"]


def test_only_settings_that_matter_are_compared(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", seed=7)])
    assert set(differing_settings(runs)) == {"seed", "optimizer.name", "optimizer.lr"}


def on_data(folder: Path, path: str, digest: str, seed: int) -> Path:
    """A run with a data path and the digest of its data."""
    run = write_run(folder, seed=seed)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": {"path": [path]}}))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "data_digest": digest * 64}))
    return run


def test_copies_of_one_dataset_are_the_same_setting(tmp_path: Path) -> None:
    """`pretrain --text` makes a dataset for each run; seeds on one text are seeds of one setting."""
    copies = [on_data(tmp_path / f"r{seed}", f"runs/r{seed}.text/data", "a", seed) for seed in (1, 2)]
    runs = read_runs(copies)
    assert differing_settings(runs) == ["seed"]
    assert len(seed_groups(runs)) == 1
    other = read_runs([copies[0], on_data(tmp_path / "r3", "runs/r3.text/data", "b", 1)])
    assert differing_settings(other) == ["data.path"]
    assert len(seed_groups(other)) == 2


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", model="one", tokenizer="1" * 64, text="1" * 64)
    b = write_run(tmp_path / "b", model="two", tokenizer="2" * 64, text="2" * 64)
    with pytest.raises(CheckpointError, match="nothing in common"):
        read_runs([a, b])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([a, a])
    with pytest.raises(ConfigError, match="no run folder given"):
        read_runs([])
    assert len(read_runs([a])) == 1


def many_settings(folder: Path, number: int, seed: int, more: bool) -> Path:
    """A run that differs from those of another number in more settings than a label holds, or in as many."""
    write_run(folder, seed=seed, lr=1e-3 * (number + 1), offset=-0.3 * number, probes=False)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optimizer"] |= {"eps": (number + 1) * 1e-8, "weight_decay": 0.1 * (number + 1)}
    config["schedule"] = {"min_lr": 0.1 * number if more else 0.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("more", [False, True])
def test_equal_folder_names_in_different_folders_are_different_labels(tmp_path: Path, more: bool) -> None:
    folders = [many_settings(tmp_path / f"exp{n}" / f"seed{s}", n, s, more) for n in (0, 1) for s in (1, 2, 3)]
    folders += [write_run(tmp_path / f"adamw{s}", optimizer="adamw", seed=s, offset=-0.2) for s in (1, 2, 3)]
    found = []
    for order in (folders, [*folders[3:6], *folders[:3], *folders[6:]]):
        runs = read_runs(order)
        assert {run.label for run in runs} >= {f"LION exp{n}/seed{s}" for n in (0, 1) for s in (1, 2, 3)}
        table = seeds_table(runs)
        assert table is not None
        found.append({row[1]: row[4] for row in table.rows if row[2] == "final test loss"})
        assert sum("final test loss: " in note and "outside the noise" in note for note in table.notes) == 3
        assert [len(table.rows) for table in loss_tables(runs)] == [9, 9, 9]
    assert found[0] == found[1]
    worse = "LION exp0" if more else "LION eps=1e-08 lr=0.001 weight_decay=0.1"
    assert found[0][worse] - min(found[0].values()) == pytest.approx(0.3)


def test_labels_and_names_of_settings_are_always_unique(tmp_path: Path) -> None:
    flat = [many_settings(tmp_path / f"exp{n}-seed{s}", n, s, True) for n in (0, 1) for s in (1, 2)]
    assert list(dict.fromkeys(run.setting for run in read_runs(flat))) == [
        "LION exp0-seed1 and 1 more", "LION exp1-seed1 and 1 more",
    ]  # fmt: skip
    nearly = [write_run(tmp_path / f"rate{n}" / "a", lr=1e-3 + n * 1e-12) for n in (0, 1)]
    assert [run.label for run in read_runs(nearly)] == ["LION lr=0.001 (rate0/a)", "LION lr=0.001 (rate1/a)"]
    run = read_run(nearly[0])
    assert [one.label for one in with_labels([run, run])] == ["LION a (a)", "LION a (a) #2"]
    twins = [replace(run, label="LION"), replace(run, label="LION")]
    assert [len(table.rows) for table in loss_tables(twins)] == [2, 2, 2]
    others = [replace(run, optimizer=name, model="m") for name in ("LION", "lion")]
    assert [one.label for one in with_labels(others)] == ["LION (a)", "LION (a) #2"]
    unnamed = seed_groups([replace(run, label="LION", settings={"optimizer.lr": rate}) for rate in (1, 2)])
    assert list(setting_names(unnamed).values()) == ["LION", "LION #2"]
