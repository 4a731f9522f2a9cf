"""No winner among runs whose losses are measured on different held-out samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.compare.best import best_table, choose_best
from megatron_lion.compare.held_out import differences
from megatron_lion.compare.panels import panels
from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.table import Table, to_html, to_markdown
from megatron_lion.runs.record import RunRecord

HELD_OUT = ("losses", "loss-by-step", "loss-by-tokens", "loss-by-time", "equal-budget", "to-target")


def edited(folder: Path, facts: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Changes run.json, and settings by dotted key with `__` for the dot."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in settings.items():
        group, _, key = name.rpartition("__")
        (config.setdefault(group, {}) if group else config)[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(facts or {})}))
    return folder


def pair(root: Path, first: dict[str, Any], second: dict[str, Any]) -> list[RunRecord]:
    return read_runs([edited(write_run(root / "a"), **first), edited(write_run(root / "b", optimizer="sgd"), **second)])


def marks(table: Table) -> set[str]:
    """The headings of the columns in which a cell is shaded in the report."""
    return {
        table.columns[column]
        for row in range(len(table.rows))
        for column in range(len(table.columns))
        if table.is_best(row, column)
    }


def by_slug(runs: list[RunRecord]) -> dict[str, Table]:
    return {table.slug: table for table in build_tables(runs)}


DIFFERENT = [
    ({"train__test_batches": 8}, {"train__test_batches": 2}, "train.test_batches 8, 2"),
    ({"train__test_batches": 10}, {"train__global_batch_size": 32}, "train.global_batch_size 16, 32"),
    ({"facts": {"data_digest": "a" * 64}}, {"facts": {"data_digest": "b" * 64}}, "data digest aaaaaaaa, bbbbbbbb"),
    ({"data__split": "90,5,5"}, {}, "data.split 90,5,5, 99.9,0.05,0.05"),
    ({"model__seq_length": 512}, {}, "model.seq_length 512, 1024"),
    ({"data__weights": [1.0, 2.0]}, {"data__weights": [2.0, 1.0]}, "data.weights (1, 2), (2, 1)"),
    (
        {"model__kind": "bert", "data__mask_probability": 0.2},
        {"model__kind": "bert"},
        "data.mask_probability 0.2, 0.15",
    ),
    (
        {"model__kind": "bert", "data__masking": "vectorized"},
        {"model__kind": "bert", "data__masking": "megatron"},
        "data.masking vectorized, megatron",
    ),
]


def test_a_run_of_an_earlier_version_has_megatrons_masks(tmp_path: Path) -> None:
    """Its config.yaml has no data.masking."""
    settings = [{"model__kind": "bert", "data__masking": name} for name in ("megatron", "vectorized")]
    old, new = pair(tmp_path, *settings)
    earlier = dataclasses.replace(
        old, settings={key: old.settings[key] for key in old.settings if key != "data.masking"}
    )
    assert differences([earlier, old]) == []
    assert differences([earlier, new]) == ["data.masking megatron, vectorized"]


@pytest.mark.parametrize(("first", "second", "named"), DIFFERENT, ids=[named for *_, named in DIFFERENT])
def test_no_winner_over_different_samples(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], named: str
) -> None:
    tables = by_slug(pair(tmp_path, first, second))
    for slug in HELD_OUT:
        table = tables[slug]
        assert marks(table) <= {"train loss"}, slug
        assert sum(named in note for note in table.notes) == 1, (slug, table.notes)
        assert named in to_markdown(table)
        assert 'best"' not in to_html(table) or slug == "losses"


def test_the_same_samples_have_a_winner(tmp_path: Path) -> None:
    """Also those of other batches of the same number of samples, and of runs that recorded less."""
    digest = {"facts": {"data_digest": "a" * 64}}
    for number, (first, second) in enumerate(
        [
            ({}, {}),
            (digest, digest),
            (digest, {}),
            (
                {"train__test_batches": 4, "train__global_batch_size": 16},
                {"train__test_batches": 2, "train__global_batch_size": 32},
            ),
            ({"data__mask_probability": 0.2}, {}),  # of BERT alone
            ({**digest, "data__split": "90,5,5"}, digest),  # the digest covers the split, if it has a meaning
        ]
    ):
        tables = by_slug(pair(tmp_path / str(number), first, second))
        for slug in HELD_OUT:
            assert marks(tables[slug]), (number, slug)
            assert not any("samples" in note for note in tables[slug].notes), (number, slug)


def test_the_training_loss_depends_on_the_data_but_not_on_the_number_of_test_batches(tmp_path: Path) -> None:
    runs = pair(tmp_path / "batches", {"train__test_batches": 8}, {"train__test_batches": 2})
    assert marks(by_slug(runs)["losses"]) == {"train loss"}
    digests = ({"facts": {"data_digest": letter * 64}} for letter in "ab")
    assert marks(by_slug(pair(tmp_path / "data", *digests))["losses"]) == set()


def test_seeds_have_samples_of_their_own_and_are_compared_by_their_means(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{name}{seed}", optimizer=name, seed=seed)
        for name in ("lion", "sgd")
        for seed in (1, 2, 3)
    ]
    tables = by_slug(read_runs(folders))
    for slug in ("losses", "loss-by-step", "equal-budget"):
        assert marks(tables[slug]) == set(), slug
        assert (
            "gpt2-small: no lowest held-out loss is marked, because each seed draws its own held-out samples"
            in tables[slug].notes
        )
    assert marks(tables["to-target"]) == {"steps", "tokens", "training minutes"}, "both settings have the same seeds"
    assert any("LION is" in note and "outside the noise" in note for note in tables["seeds"].notes)
    tables = by_slug(read_runs(folders[:5]))
    assert marks(tables["to-target"]) == set()
    assert any("outside the noise" in note for note in tables["seeds"].notes), (
        "the noise of the samples is in the scatter"
    )


def test_seeds_measured_on_different_samples_have_no_verdict(tmp_path: Path) -> None:
    folders = [
        edited(write_run(tmp_path / f"{name}{seed}", optimizer=name, seed=seed), train__test_batches=batches)
        for name, batches in (("lion", 8), ("sgd", 2))
        for seed in (1, 2, 3)
    ]
    notes = by_slug(read_runs(folders))["seeds"].notes
    assert [note for note in notes if "final test loss" in note] == [
        "gpt2-small, final test loss: no gap is judged, because the runs are tested on different samples "
        "(train.test_batches 8, 2)"
    ]
    assert any("zero-shot log perplexity" in note and "outside the noise" in note for note in notes), "of one text"


def test_other_models_of_a_table_keep_their_winner(tmp_path: Path) -> None:
    folders = [
        edited(write_run(tmp_path / f"{model}-{name}", optimizer=name, model=model), train__test_batches=batches)
        for model, name, batches in (("a", "lion", 8), ("a", "sgd", 2), ("b", "lion", 4), ("b", "sgd", 4))
    ]
    table = by_slug(read_runs(folders))["losses"]
    column = table.columns.index("test loss")
    assert [table.is_best(row, column) for row in range(4)] == [False, False, True, False]


def test_token_perplexities_of_different_vocabularies_have_no_winner(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", tokenizer="u" * 64)])
    tables = by_slug(runs)
    assert marks(tables["log-perplexity"]) == set()
    assert marks(tables["log-adjusted-perplexity"]) == {"200", "400", "600", "800", "1k"}


def test_figures_name_different_samples(tmp_path: Path) -> None:
    runs = pair(tmp_path / "a", {"train__test_batches": 8}, {"train__test_batches": 2})
    labels = {panel.slug: panel.y_label for panel in panels(runs)}
    assert labels["test-loss"] == "nats per token; on different samples"
    assert "samples" not in labels["training-loss"]
    labels = {panel.slug: panel.y_label for panel in panels(pair(tmp_path / "b", {}, {}))}
    assert labels["test-loss"] == "nats per token"


def test_no_setting_is_chosen_by_losses_of_different_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        edited(write_run(tmp_path / f"lion{rate}", lr=rate), train__test_batches=batches)
        for rate, batches in ((1e-3, 8), (1e-4, 2))
    ]
    (choice,) = choose_best(read_runs(folders))
    assert choice.runs == ()
    assert "validation losses are of different samples (train.test_batches 8, 2)" in "".join(choice.notes)
    assert main(["compare", *map(str, folders), "--best", "--output", str(tmp_path / "out"), "--no-figures"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.test_batches 8, 2" in line
    other = edited(write_run(tmp_path / "sgd", optimizer="sgd"), train__test_batches=2)
    choices = choose_best(read_runs([folders[0], other]))
    assert all(choice.runs for choice in choices), "each is the only setting of its optimizer"
    assert any("validation losses are of different samples" in note for note in best_table(choices).notes)
