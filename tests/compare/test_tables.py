"""Tables of a comparison and their output formats."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_runs import write_run

from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.table import Table, to_csv, to_html, to_latex, to_markdown, to_rich
from megatron_lion.runs.record import RunRecord


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
    row = tables["norm-ratio"].rows[0]
    assert row[3] == pytest.approx(11156.9, abs=0.05)
    assert row[4] == 6
    assert 0.62 <= row[8] <= row[9] <= 0.72
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


def test_equal_budgets_and_targets(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", steps=1000), write_run(tmp_path / "b", optimizer="sgd", steps=500)])
    tables = by_slug(build_tables(runs))
    lion, sgd = tables["equal-budget"].rows
    assert lion[2] == lion[3] == value_at(runs[0].series("test/loss"), 500)
    assert sgd[2] == runs[1].series("test/loss").last
    target = max(min(run.series("test/loss").values) for run in runs)
    lion, sgd = tables["to-target"].rows
    assert sgd[2] == target
    assert lion[3] == runs[0].series("test/loss").first_at_most(target)
    assert lion[4] == lion[3] * 16 * 1024
    assert lion[5] == pytest.approx(runs[0].training_seconds(lion[3]) / 60)
    unreachable = by_slug(build_tables(runs, target_loss=0.1))["to-target"]
    assert [row[3:] for row in unreachable.rows] == [[None, None, None]] * 2


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
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(to_rich(table))
    assert "p|q" in console.export_text()
