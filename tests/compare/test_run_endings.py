"""Unfinished and diverged runs, losses that were not finite, and results of different steps in the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import write_run

from megatron_lion.compare.best import choose_best
from megatron_lion.compare.budgets import equal_budget_table, geometric_mean, target_table
from megatron_lion.compare.run_tables import settings_table
from megatron_lion.compare.seeds import seeds_table
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.table import Table
from megatron_lion.runs.record import read_run

LOSS, PERPLEXITY = "final test loss", "zero-shot log perplexity"
DIVERGED = {"step": 403, "optim/skipped_steps": 3}
NOT_FINITE = {"step": 1000, "test/loss": None, "valid/loss": None}


def edit(folder: Path, *, until: int = 1000, add: tuple[dict[str, Any], ...] = ()) -> Path:
    """Cuts a run's metrics after a step and adds lines."""
    path = folder / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= until]
    path.write_text("\n".join([*kept, *map(json.dumps, add)]) + "\n")
    return folder


def configure(folder: Path, **train: Any) -> Path:
    """Changes settings of a run's training."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["train"] |= train
    path.write_text(yaml.safe_dump(config))
    return folder


def seeds(root: Path, optimizer: str, count: int = 3, **settings: Any) -> list[Path]:
    return [
        write_run(root / f"{optimizer}{seed}", optimizer=optimizer, seed=seed, probes=False, **settings)
        for seed in range(1, count + 1)
    ]


def table_of(folders: list[Path]) -> Table:
    table = seeds_table(read_runs(folders))
    assert table is not None
    return table


def row_of(table: Table, setting: str, measure: str) -> list[Any]:
    (row,) = (row for row in table.rows if row[1] == setting and row[2].startswith(measure))
    return row[3:]


def has_verdict(table: Table) -> bool:
    return any("side the noise" in note for note in table.notes)


@pytest.mark.parametrize("late", ["diverged", "unfinished"])
def test_a_setting_with_an_unfinished_seed_has_no_verdict(tmp_path: Path, late: str) -> None:
    folders = [*seeds(tmp_path, "lion", 4), *seeds(tmp_path, "adamw", 4)]
    assert has_verdict(table_of(folders))
    edit(folders[1], until=400, add=(DIVERGED,) if late == "diverged" else ())
    table = table_of(folders)
    assert not has_verdict(table)
    where = "diverged at step 403" if late == "diverged" else "is at step 400 of 1,000"
    assert table.notes[0] == (
        f"gpt2-small, LION: 3 of 4 seeds are finished, seed 2 {where}, so no gap to this setting is judged; "
        "its mean is over the finished seeds"
    )
    finals = [read_run(folder).series("test/loss").last for folder in (folders[0], *folders[2:4])]
    assert row_of(table, "LION", LOSS)[:2] == [3, pytest.approx(sum(finals) / 3)]
    assert row_of(table, "LION", PERPLEXITY)[0] == 3
    for folder in folders[4:]:
        edit(folder, until=300)
    table = table_of(folders)
    assert row_of(table, "AdamW", LOSS) == [0, None, None, None]
    assert "0 of 4 seeds are finished" in table.notes[1]
    assert "and 1 more" in table.notes[1]


def test_settings_whose_seeds_are_finished_are_still_compared(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "lion"), *seeds(tmp_path, "adamw"), *seeds(tmp_path, "sgd", 1)]
    edit(folders[-1], until=400)
    table = table_of(folders)
    assert "gpt2-small, SGD: its only run is at step 400 of 1,000, so no gap to this setting is judged" in table.notes
    (verdict,) = (note for note in table.notes if f"{LOSS}: " in note)
    assert "LION is " in verdict
    assert "below AdamW, outside the noise" in verdict


def test_a_loss_that_is_not_finite_at_the_end_is_not_replaced_by_an_earlier_one(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "lion"), *seeds(tmp_path, "adamw")]
    edit(folders[0], add=(NOT_FINITE,))
    run = read_run(folders[0])
    assert (run.finished, run.series("test/loss").steps[-1], run.final("test/loss"), run.valid_loss) == (
        True, 900, None, None,
    )  # fmt: skip
    table = table_of(folders)
    assert row_of(table, "LION", LOSS)[0] == 2
    why = "seed 1 has no finite value at the step compared (not measured there, or not a number)"
    reason = f"gpt2-small, {LOSS}, LION: {why}, so no gap to this setting is judged"
    assert reason in table.notes
    assert not any(f"{LOSS}: " in note for note in table.notes)
    assert any(f"{PERPLEXITY} at step 1,000: LION is " in note for note in table.notes)
    edit(folders[1], add=({"step": 1000, "test/loss": None},))
    lion, adamw = choose_best(read_runs(folders[1:]))
    assert [len(choice.runs) for choice in (lion, adamw)] == [2, 3]
    assert [choice.optimism.measured_by for choice in (lion, adamw)] == [0, 1], "LION has one final test loss left"


def test_the_last_due_measurement_of_a_run_that_stops_early(tmp_path: Path) -> None:
    """With an interval of 100 and a stop after 350, the last measurement is due at step 300."""
    folder = configure(edit(write_run(tmp_path / "a"), until=350), stop_after=350, test_every=100)
    run = read_run(folder)
    assert (run.finished, run.planned_steps, run.last_due) == (True, 350, 300)
    assert run.final("test/loss") == (300, run.series("test/loss").last)
    assert run.valid_loss == run.series("valid/loss").last
    part = read_run(configure(edit(write_run(tmp_path / "c"), until=320), stop_after=350, test_every=100))
    assert (part.finished, part.final("test/loss")) == (False, None), (
        "the last due measurement is made, but the run is unfinished"
    )
    edit(folder, until=350, add=({"step": 300, "test/loss": None, "valid/loss": None},))
    run = read_run(folder)
    assert (run.final("test/loss"), run.valid_loss) == (None, None)
    short = configure(edit(write_run(tmp_path / "b"), until=50), stop_after=50, test_every=100)
    assert read_run(short).series("test/loss").steps == (0,)
    assert read_run(short).final("test/loss") is None, "the loss before training is not a final one"


def test_runs_of_different_planned_lengths_are_different_settings(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "lion", 6)
    for folder in folders[3:]:
        configure(edit(folder, until=300), stop_after=300, test_every=100)
    table = table_of(folders)
    assert [row[1:4] for row in table.rows[:2]] == [["LION", LOSS, 3], ["LION stop_after=300", LOSS, 3]]
    assert "gpt2-small: the final test losses are of different steps, 300 to 1,000" in table.notes
    assert "train.stop_after" in [row[0] for row in settings_table(read_runs(folders[2:4])).rows]
    configure(folders[0], stop_after=1000)
    assert len(table_of(folders[:3]).rows) == 2, "a stop at the end of the schedule is no other setting"


def test_seeds_that_were_last_measured_at_different_steps_have_no_verdict(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "lion"), *seeds(tmp_path, "adamw")]
    for place, folder in enumerate(folders):
        edit(configure(folder, stop_after=500, test_every=100 if place else 200), until=500 if place else 400)
        edit(folder, until=500, add=({"step": 500, "progress/consumed_tokens": 500 * 16 * 1024},))
    table = table_of(folders)
    assert any("LION: its seeds were last measured at different steps (400, 500)" in note for note in table.notes)
    assert row_of(table, "LION", LOSS) == [3, None, None, None]
    assert not any(f"{LOSS}: " in note for note in table.notes)


def test_perplexities_are_compared_at_the_last_common_step(tmp_path: Path) -> None:
    short = seeds(tmp_path, "lion", eval_steps=(200, 400))
    table = table_of([*short, *seeds(tmp_path, "adamw")])
    assert {row[2] for row in table.rows} == {LOSS, f"{PERPLEXITY} at step 400"}
    values = [read_run(folder).evaluations[-1]["log_token_ppl"] for folder in short]
    assert row_of(table, "LION", PERPLEXITY)[1] == pytest.approx(sum(values) / 3)
    assert any(f"{PERPLEXITY} at step 400: LION is " in note for note in table.notes)
    table = table_of([*short, *seeds(tmp_path, "sgd", eval_steps=(600,))])
    assert {row[2] for row in table.rows} == {LOSS}
    assert (
        f"gpt2-small: there is no verdict on the {PERPLEXITY}, because the finished runs that have one share no step"
        in table.notes
    )


def test_a_run_that_stopped_early_does_not_set_the_default_target(tmp_path: Path) -> None:
    lion = seeds(tmp_path, "lion", 2)
    alone = target_table(read_runs(lion))
    stopped = edit(write_run(tmp_path / "sgd", optimizer="sgd"), until=50, add=({**DIVERGED, "step": 53},))
    table = target_table(read_runs([*lion, stopped]))
    assert table.rows[0] == alone.rows[0]
    assert table.rows[1][1:] == ["SGD", alone.rows[0][2], "0 of 1", None, None, None, None, None]
    assert table.notes[0] == "gpt2-small: the target is taken from finished runs only; SGD diverged at step 53"
    assert not any("first measurement" in note for note in table.notes)


def test_the_default_target_without_a_finished_run(tmp_path: Path) -> None:
    folders = [edit(folder, until=500) for folder in seeds(tmp_path, "lion", 2)]
    folders.append(edit(write_run(tmp_path / "sgd", optimizer="sgd"), until=50, add=({**DIVERGED, "step": 53},)))
    table = target_table(read_runs(folders))
    assert table.rows[0][2] < 6
    assert [row[3] for row in table.rows] == ["2 of 2", "0 of 1"]
    assert table.notes[0].startswith(
        "gpt2-small: no run is finished, so the target is a loss that all unfinished runs that did not diverge reached so far; "
    )
    edit(write_run(tmp_path / "b" / "sgd", optimizer="sgd"), until=50, add=({**DIVERGED, "step": 53},))
    table = target_table(read_runs([tmp_path / "sgd", tmp_path / "b" / "sgd"]))
    assert "that all unfinished runs reached so far" in table.notes[0]
    assert "the first measurement of 2 runs is at or below the target" in table.notes[1]


def test_a_seed_at_the_target_from_the_start_has_an_arithmetic_mean_and_a_note(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "lion", 2)
    edit(folders[0], add=({"step": 0, "test/loss": 4.5},))
    for step in range(100, 1001, 100):
        edit(folders[0], add=({"step": step, "test/loss": 4.5},))
    table = target_table(read_runs(folders), 5.0)
    (row,) = table.rows
    other = target_table(read_runs(folders[1:]), 5.0).rows[0][4]
    assert row[3:7] == ["2 of 2", pytest.approx(other / 2), None, None]
    assert "the first measurement of 1 run is at or below the target" in table.notes[0]
    assert "a seed reached the target at step 0, which has no logarithm: arithmetic means" in table.notes[1]
    assert geometric_mean([0.0, 1000.0, 2000.0]).estimate == 1000.0


def test_a_run_that_diverged_does_not_limit_the_equal_budget(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, optimizer=name) for name in ("lion", "sgd", "adamw")]
    edit(folders[1], until=400, add=(DIVERGED,))
    edit(folders[2], until=700)
    runs = read_runs(folders)
    table = equal_budget_table(runs)
    lion, sgd, adamw = (row[2:] for row in table.rows)
    at = [dict(zip(run.series("test/loss").steps, run.series("test/loss").values, strict=True)) for run in runs]
    assert lion[0] == at[0][700]
    assert adamw[0] == at[2][700]
    assert sgd == [None, None, None], "it did not reach the budget, and has a measurement in its second half"
    assert table.notes[0].startswith("gpt2-small: 700 steps, 11,468,800 tokens, ")
    assert table.notes[0].endswith("; a run that diverged does not limit the budget: SGD diverged at step 403")

    late = equal_budget_table(read_runs([folders[1], edit(folders[2], until=300)]))
    assert [row[2] for row in late.rows] == [at[1][300], at[2][300]], "a value at a budget that it reached is shown"


def test_an_equal_budget_of_diverged_runs_only_is_the_shortest_of_them(tmp_path: Path) -> None:
    folders = [edit(write_run(tmp_path / name, optimizer=name), until=400, add=(DIVERGED,)) for name in ("lion", "sgd")]
    edit(folders[1], until=300, add=(DIVERGED,))
    table = equal_budget_table(read_runs(folders))
    assert all(row[2] is not None for row in table.rows)
    assert table.notes[0].startswith("gpt2-small: 300 steps, ")
    assert "diverged" not in table.notes[0]
