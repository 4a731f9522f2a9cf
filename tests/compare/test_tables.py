"""Tables of a comparison and their output formats."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from scipy import stats
from synthetic_runs import write_run

from megatron_lion.compare.budgets import crossing, default_target, falling, geometric_mean, target_table
from megatron_lion.compare.run_tables import build_tables, ratio_table
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.table import Table, to_csv, to_html, to_latex, to_markdown
from megatron_lion.runs.record import RunRecord
from megatron_lion.runs.series import Series


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecord]:
    return read_runs([write_run(tmp_path / name, optimizer=name) for name in ("lion", "sgd", "adamw")])


def by_slug(tables: list[Table]) -> dict[str, Table]:
    return {table.slug: table for table in tables}


def value_at(series, step):
    """The last value that is not after a step."""
    return [value for at, value in zip(series.steps, series.values, strict=True) if at <= step][-1]


def test_table_b1_holds_the_natural_log_of_each_checkpoint(runs: list[RunRecord]) -> None:
    table = by_slug(build_tables(runs))["log-perplexity"]
    assert table.columns == ["model", "optimizer", "200", "400", "600", "800", "1k"]
    assert [row[:2] for row in table.rows] == [["gpt2-small", name] for name in ("LION", "SGD", "AdamW")]
    for row, run in zip(table.rows, runs, strict=True):
        for cell, result in zip(row[2:], run.evaluations, strict=True):
            assert cell == math.log(result["token_ppl"]) or cell == pytest.approx(math.log(result["token_ppl"]))
    assert "WikiText-103 tokens test" in table.notes[0]
    assert "stride 32" in table.notes[0]
    assert "n_tok 270,330" in table.notes[0]


def test_conventions_are_never_mixed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", optimizer="sgd", text="f" * 64, eval_steps=(500,))
    tables = by_slug(build_tables(read_runs([a, b])))
    assert [row[1] for row in tables["log-perplexity"].rows] == ["LION"]
    assert [row[1] for row in tables["log-perplexity-2"].rows] == ["SGD"]


def test_other_vocabularies_are_pointed_out(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", tokenizer="u" * 64)])
    tables = by_slug(build_tables(runs))
    assert any("different vocabularies" in note for note in tables["log-perplexity"].notes)
    assert len(tables["log-adjusted-perplexity"].notes) == 1


def test_losses_ratios_and_cost(runs: list[RunRecord]) -> None:
    tables = by_slug(build_tables(runs))
    row = tables["losses"].rows[0]
    assert row[3] == pytest.approx(sum(runs[0].series("train/loss").values[-10:]) / 10)
    assert row[5] == min(runs[0].series("test/loss").values)
    row = tables["cost"].rows[0]
    assert row[5] == pytest.approx(30_000, rel=0.02)
    assert row[7] == 1.5


def test_settings_diff_shows_what_differs_only(runs: list[RunRecord]) -> None:
    table = by_slug(build_tables(runs))["settings"]
    assert {row[0] for row in table.rows} == {"optimizer.name", "optimizer.lr"}
    many = by_slug(build_tables([*runs, *runs, *runs]))["settings"]
    assert many.columns == ["model", "optimizer", "optimizer.lr", "optimizer.name"]
    assert len(many.rows) == 9
    same = by_slug(build_tables(runs))["environment"]
    assert ["processes", "2", "all"] in same.rows
    assert ["optimizer.lr", "0.001", "0.3", "0.003"] in table.rows


def test_equal_budgets(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", steps=1000), write_run(tmp_path / "b", optimizer="sgd", steps=500)])
    tables = by_slug(build_tables(runs))
    lion, sgd = tables["equal-budget"].rows
    assert lion[2] == lion[3] == value_at(runs[0].series("test/loss"), 500)
    assert sgd[2] == runs[1].series("test/loss").last


def as_rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_norm_ratio_has_its_noise_and_its_errors(tmp_path: Path) -> None:
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new", optimizer="sgd", d=10_000)
    added = [
        {"step": step, "probe/noise_share": share, "probe/norm_ratio_standard_error": 0.5 + step / 1000,
         "probe/norm_ratio_low": 55.0, "probe/norm_ratio_high": 65.0, "probe/norm_ratio_noise": 42.0}
        for step, share in ((0, 0.25), (400, 0.75), (1000, 0.5))
    ]  # fmt: skip
    with (new / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in added)
    runs = read_runs([old, new])
    table = ratio_table(runs)
    lacking, row = as_rows(table)
    ratio = runs[1].series("probe/norm_ratio").values
    assert row == {
        "model": "gpt2-small", "optimizer": "SGD", "√d": 100.0, "probes": 6, "batches": "100",
        "noise first": 0.25, "noise last": 0.5, "noise largest": 0.75,
        "r first": ratio[0], "± first": 0.5, "r last": ratio[-1], "± last": 1.5,
        "r/√d first": ratio[0] / 100, "r/√d last": ratio[-1] / 100, "r/√d ≥": 0.55, "r/√d ≤": 0.65, "r/√d noise": 0.42,
        "KKT first": ratio[0] * 2, "KKT last": ratio[-1] * 2 / 1001,
    }  # fmt: skip
    missing = ["noise first", "noise last", "noise largest", "± first", "± last", "r/√d ≥", "r/√d ≤", "r/√d noise"]
    assert [name for name, value in lacking.items() if value is None] == missing
    assert "| 100.0 | 6 | 100 | 25.0% | 50.0% | 75.0% |" in to_markdown(table)


# --- to a target ---

STEPS = range(0, 1001, 50)


def line_of(step: float) -> float:
    """A loss that falls from 6 at step 0 to 4 at step 1,000."""
    return 6 - step / 500


def write_losses(folder: Path, losses: dict[int, float], **settings: Any) -> Path:
    """A run with these test losses in place of its own."""
    write_run(folder, **settings)
    path = folder / "metrics.jsonl"
    lines = [{k: v for k, v in json.loads(line).items() if k != "test/loss"} for line in path.open()]
    lines += [{"step": step, "test/loss": loss} for step, loss in losses.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_known_crossing_is_found_between_measurements() -> None:
    losses = [line_of(step) for step in STEPS]
    for target in (5.99, 5.123, 5.0, 4.001, 4.0):
        assert crossing(STEPS, losses, target) == pytest.approx((6 - target) * 500)
    assert crossing(STEPS, losses, 3.999) is None
    assert crossing(STEPS, losses, 6.5) == 0
    assert crossing([400], [3.0], 3.5) == 400


@examples(100)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=20), st.floats(0, 20))
def test_the_smoothed_curve_never_rises_and_keeps_the_mean(losses: list[float], target: float) -> None:
    smooth = falling(losses)
    assert all(a >= b for a, b in pairwise(smooth))
    assert sum(smooth) == pytest.approx(sum(losses), abs=1e-9)
    steps = range(0, 10 * len(losses), 10)
    step = crossing(steps, losses, target)
    assert (step is None) == (smooth[-1] > target)
    if step is not None:
        assert step <= steps[-1]
        assert np.interp(step, steps, smooth) <= target + 1e-9
        assert all(loss > target for at, loss in zip(steps, smooth, strict=True) if at < step - 1e-6)


def test_noise_moves_a_crossing_by_no_more_than_its_slope_explains() -> None:
    rng = np.random.default_rng(5)
    clean = np.array([line_of(step) for step in STEPS])
    found = np.array([crossing(STEPS, (clean + 0.05 * rng.normal(size=len(clean))).tolist(), 5.01) for _ in range(500)])
    assert found.mean() == pytest.approx(495, abs=4 * 25 / math.sqrt(500))
    # 0.05 nats on a slope of 1/500 are 25 steps. The first raw measurement at or below 5.01 scatters by 30 and is 30 off.
    assert found.std() < 25
    first = [STEPS[int(np.argmax(clean + 0.05 * rng.normal(size=len(clean)) <= 5.01))] for _ in range(500)]
    assert abs(np.mean(first) - 495) > abs(found.mean() - 495) + 4


def test_one_lucky_evaluation_moves_the_crossing_little() -> None:
    losses = [line_of(step) for step in STEPS]
    for place, step in enumerate(STEPS):
        lucky = [*losses[:place], losses[place] - 0.4, *losses[place + 1 :]]
        moved = crossing(STEPS, lucky, 5.0)
        # 0.4 nats are 200 steps, by which the first measurement at or below 5.0 may be too early. The low measurement is
        # averaged with the four later ones that are higher, so half remains, and at most one interval between measurements.
        assert abs(moved - 500) <= 200 / 2 + 50, step
    assert default_target([Series(tuple(STEPS), (*losses[:-1], 3.0))]) == default_target(
        [Series(tuple(STEPS), tuple(losses))]
    )


def test_the_default_target_is_reached_by_every_run_with_room(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", steps=500)]
    runs = read_runs(folders)
    table = target_table(runs)
    lion, sgd = as_rows(table)
    series = [run.series("test/loss") for run in runs]
    assert lion["target (nats)"] == sgd["target (nats)"] == default_target(series)
    assert round(lion["target (nats)"], 2) == lion["target (nats)"]
    assert sgd["steps"] <= 0.9 * 500
    for row, run in zip((lion, sgd), runs, strict=True):
        curve = run.series("test/loss")
        step = crossing(curve.steps, curve.values, row["target (nats)"])
        low = curve.steps[0] + 100 * int(step // 100)
        seconds = [run.training_seconds(at) for at in (low, low + 100)]
        assert row["reached by"] == "1 of 1"
        assert (row["steps low"], row["steps high"]) == (None, None)
        assert row["steps"] == pytest.approx(step)
        assert row["tokens"] == pytest.approx(step * 16 * 1024)
        assert row["training minutes"] == pytest.approx(np.interp(step, (low, low + 100), seconds) / 60)
    assert any("within 90% of its steps" in note for note in table.notes)
    assert any("isotonic" in note for note in table.notes)
    assert any("the noise of its steps is not known" in note for note in table.notes)


def test_the_seeds_of_a_setting_are_one_row(tmp_path: Path) -> None:
    crossings = (400.0, 500.0, 640.0)
    folders = [
        write_losses(tmp_path / str(seed), {step: line_of(step) + (at - 500) / 500 for step in STEPS}, seed=seed)
        for seed, at in enumerate(crossings, start=1)
    ]
    runs = read_runs(folders)
    (row,) = as_rows(target_table(runs, 5.0))
    logs = np.log(crossings)
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert (row["optimizer"], row["reached by"]) == ("LION", "3 of 3")
    assert [row["steps"], row["steps low"], row["steps high"]] == pytest.approx(np.exp([logs.mean(), low, high]))
    assert row["tokens"] == pytest.approx(row["steps"] * 16 * 1024)


def test_a_seed_that_does_not_reach_the_target_leaves_no_mean(tmp_path: Path) -> None:
    folders = [
        write_losses(tmp_path / str(seed), {step: line_of(step) for step in STEPS}, seed=seed) for seed in (1, 2)
    ]
    short = {step: line_of(step) for step in STEPS if step <= 400}
    folders.append(write_losses(tmp_path / "3", short, seed=3))
    table = target_table(read_runs(folders), 5.0)
    (row,) = as_rows(table)
    assert list(row.values())[3:] == ["2 of 3", None, None, None, None, None]
    assert table.notes[0] == "gpt2-small, LION: reached by 2 of 3 seeds, so there is no mean"
    lucky = write_losses(tmp_path / "4", {0: 6.0, 100: 4.9, 200: 5.9, 300: 5.8}, seed=4)
    table = target_table(read_runs([*folders, lucky]), 5.0)
    assert "single measurements, but not the smoothed curve, are at or below the target" in table.notes[0]
    unreachable = target_table(read_runs(folders[:1]), 0.1)
    assert unreachable.rows[0][3:] == ["0 of 1", None, None, None, None, None]
    assert not any("single measurements" in note for note in unreachable.notes)


def test_a_target_that_holds_from_the_start_has_no_interval(tmp_path: Path) -> None:
    folders = [write_losses(tmp_path / str(seed), {0: 6.0, 100: 5.0}, seed=seed) for seed in (1, 2)]
    (row,) = as_rows(target_table(read_runs(folders), 7.0))
    assert [row["steps"], row["steps low"], row["tokens"], row["training minutes"]] == [0.0, None, 0.0, 0.0]


def test_seeds_far_apart_have_an_unbounded_interval(tmp_path: Path) -> None:
    found = geometric_mean([1.0, 1e9])
    assert found.estimate == pytest.approx(math.sqrt(1e9))
    assert found.low == pytest.approx(0.0)
    assert geometric_mean([1.0, 1e300]).high == math.inf


def test_losses_by_step_by_tokens_and_by_time_are_aligned(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", steps=1000), write_run(tmp_path / "b", optimizer="sgd", steps=500)])
    tables = by_slug(build_tables(runs))
    by_step = tables["loss-by-step"]
    assert by_step.columns == ["model", "optimizer", "200", "400", "600", "800", "1k"]
    lion, sgd = by_step.rows
    assert lion[2:] == [value_at(runs[0].series("test/loss"), step) for step in (200, 400, 600, 800, 1000)]
    assert sgd[3:] == [value_at(runs[1].series("test/loss"), 400), None, None, None], "it had ended"
    assert [row[2:] for row in tables["loss-by-tokens"].rows] == [row[2:] for row in by_step.rows]
    assert tables["loss-by-tokens"].columns[2] == "3.2768M"
    by_time = tables["loss-by-time"]
    assert by_time.columns[2:] == ["2 min", "4 min", "6 min", "8 min"]
    within = [s for s in runs[0].series("test/loss").steps if runs[0].training_seconds(s) <= 120]
    assert by_time.rows[0][2] == value_at(runs[0].series("test/loss"), within[-1])


def test_a_loss_measured_long_before_does_not_stand_for_a_later_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd")]
    for folder, kept in zip(folders, ((0, 1000), (0, 300, 1000)), strict=True):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        texts = [json.dumps(line) for line in lines if "test/loss" not in line or line["step"] in kept]
        (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    tables = by_slug(build_tables(read_runs(folders)))
    lion, sgd = (row[2:] for row in tables["loss-by-step"].rows)
    assert tables["loss-by-step"].columns[2:] == ["400", "1k"]
    assert lion[0] is None, "its only earlier measurement is the one at the start"
    assert None not in (lion[1], *sgd)


def test_page_and_lambada_results_have_tables_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    base = {"step": 1000, "text_version": "WikiText raw test", "text_sha256": "r"}
    pages = {**base, "kind": "wikitext103_pages", "word_ppl": 37.37, "byte_ppl": 1.9682, "bits_per_byte": 0.9769}
    (folder / "eval" / "wikitext103_pages-step_0001000.json").write_text(json.dumps(pages))
    lambada = {**base, "kind": "lambada", "accuracy": 0.325, "word_ppl": 40.1, "log_word_ppl": 3.69}
    (folder / "eval" / "lambada-step_0001000.json").write_text(json.dumps(lambada))
    tables = by_slug(build_tables(read_runs([folder])))
    assert tables["wikitext103-pages"].rows[0][3:] == [1000, 37.37, 1.9682, 0.9769]
    assert "32.50%" in to_markdown(tables["lambada"])


def test_bert_has_a_table_of_its_two_losses(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    line = {"step": 1000, "time": 1.0, "test/mlm_loss": 2.5, "test/sop_loss": 0.6, "test/mlm_accuracy": 0.5}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    tables = by_slug(build_tables(read_runs([folder])))
    assert tables["bert"].rows == [["gpt2-small", "LION", 2.5, 0.6, 0.5, None]]
    assert "50.0%" in to_markdown(tables["bert"])


def test_a_run_that_only_started_gives_dashes(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: m\noptimizer: {name: lion}\n")
    (folder / "metrics.jsonl").write_text("")
    tables = build_tables(read_runs([folder]))
    text = "".join(map(to_markdown, tables))
    assert "–" in text
    assert "losses" in by_slug(tables)


def test_written_forms() -> None:
    table = Table(
        slug="t", title="A_title & more", columns=["model", "a|b", "x"],
        rows=[["m", "p|q", 1.23456789], ["m", "<r>", 1e9], ["m", "none", None]],
        formats={"x": ".2f"}, notes=["a <note>"], best=["x"],
    )  # fmt: skip
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [
        ["model", "a|b", "x"], ["m", "p|q", "1.23456789"], ["m", "<r>", "1000000000.0"], ["m", "none", ""]
    ]  # fmt: skip
    markdown = to_markdown(table)
    assert "| m | p\\|q | **1.23** |" in markdown
    assert "|---|---|---:|" in markdown
    assert r"\caption{A\_title \& more}" in to_latex(table)
    assert r"m & p|q & \textbf{1.23} \\" in to_latex(table)
    page = to_html(table)
    assert "&lt;r&gt;" in page
    assert '<td class="number best">1.23</td>' in page
    assert "a &lt;note&gt;" in page
