"""Seed groups, PNG figures, the HTML report and the command that writes them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.compare.axis_ticks import spread, ticks
from megatron_lion.compare.html_report import render_report
from megatron_lion.compare.labels import seed_groups
from megatron_lion.compare.panels import lines_of, panels
from megatron_lion.compare.png_figures import write_figures
from megatron_lion.compare.ratio_curves import NOISE_RATIO
from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.seeds import corrected_gap, seeds_table, sentence, verdicts
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.svg_charts import HEIGHT, WIDTH, chart
from megatron_lion.intervals import gap_interval, mean_interval
from megatron_lion.runs.record import RunRecord


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / name, optimizer=name) for name in ("lion", "sgd", "adamw")]


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[RunRecord]:
    return read_runs(folders)


# --- seeds ---


def test_a_gap_is_called_noise_only_if_its_interval_contains_zero() -> None:
    near = corrected_gap([1.00, 1.05, 0.95], [1.01, 0.97, 1.03])
    far = corrected_gap([1.00, 1.05, 0.95], [2.01, 1.97, 2.03])
    assert near.low < 0 < near.high
    assert far.high < 0
    assert "no winner" in sentence("A", "B", near)
    assert sentence("A", "B", far).startswith("A is 1.003 below B, outside the noise of the seeds (interval -1.1")
    assert sentence("B", "A", corrected_gap([2.01, 1.97, 2.03], [1.00, 1.05, 0.95])).startswith("B is 1.003 above A")
    assert sentence("A", "B", far).endswith("p < 0.001).")
    assert "single seed on one side" in sentence("A", "B", corrected_gap([1.0], [2.0, 2.1]))


values = st.lists(st.floats(0, 10), min_size=2, max_size=6).filter(lambda side: max(side) - min(side) > 1e-9)


@examples(100)
@given(values, values, st.integers(1, 45))
def test_a_corrected_interval_and_its_p_never_contradict_each_other(a: list[float], b: list[float], pairs: int) -> None:
    gap, alone = corrected_gap(a, b, pairs), gap_interval(a, b)
    assert gap.confidence == pytest.approx(1 - 0.05 / pairs)
    assert gap.p_value == min(1.0, pairs * alone.p_value)
    assert gap.low <= alone.low <= alone.high <= gap.high
    if abs(gap.p_value - 0.05) > 1e-9:
        assert (gap.p_value < 0.05) == ("outside the noise" in sentence("A", "B", gap))


def test_several_pairs_are_corrected_and_the_note_states_how() -> None:
    values = {"a": [1.0, 1.1, 1.2], "b": [1.3, 1.4, 1.5], "c": [1.29, 1.4, 1.51], "one": [3.0]}
    two = verdicts({name: values[name] for name in ("a", "b")})
    assert len(two) == 1
    assert "outside the noise" in two[0]
    four = verdicts(values)
    assert len(four) == 7
    assert "a and b is inside the noise" in four[0], "three pairs: 2 p of one"
    assert [text for text in four if "single seed" in text] == [four[2], four[4], four[5]]
    assert (
        four[-1]
        == "these intervals and p are corrected for 3 pairs (Bonferroni): they hold together with 95% confidence."
    )


def test_equal_values_of_all_seeds_are_no_verdict_and_small_gaps_are_not_shown_as_zero() -> None:
    (text,) = verdicts({"a": [3.0, 3.0], "b": [3.0001, 3.0001]})
    assert (
        text
        == "the gap of 0.0001 between a and b: all seeds of a and b gave the same value, so their noise is not known."
    )
    found = verdicts({"a": [3.0, 3.1], "b": [4.0, 4.0], "c": [5.0, 5.1]})
    assert ["all seeds of b gave the same value" in text for text in found] == [True, False, True]
    assert "outside the noise" in found[1]
    assert not any("corrected for" in text for text in found), "one pair with known noise"
    (text,) = verdicts({"a": [3.0, 3.000001], "b": [3.0002, 3.000201]})
    assert text.startswith("a is 0.0002 below b, outside the noise of the seeds (interval -0.0002 to -0.0002,")


def test_seeds_with_equal_results_have_a_mean_without_an_interval(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"lion{s}", seed=s) for s in (1, 2)]
    (folders[1] / "metrics.jsonl").write_text((folders[0] / "metrics.jsonl").read_text())
    table = seeds_table(read_runs(folders))
    assert table is not None
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["seeds"] == 2
    assert row["mean"] is not None
    assert row["low"] is None
    assert row["high"] is None


def test_settings_of_the_same_name_stay_two_settings() -> None:
    sides = [("LION", [1.0, 1.1]), ("LION", [3.0, 3.1]), ("SGD", [2.0, 2.1])]
    assert [text.split(",")[0] for text in verdicts(sides)[:3]] == [
        "LION is 2.000 below LION", "LION is 1.000 below SGD", "LION is 1.000 above SGD",
    ]  # fmt: skip


def test_seeds_of_one_setting_are_grouped_and_judged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"lion{s}", seed=s) for s in (1, 2, 3, 4)]
    folders += [write_run(tmp_path / f"adamw{s}", optimizer="adamw", seed=s) for s in (1, 2, 3, 4)]
    folders += [write_run(tmp_path / "other", lr=5e-4, seed=1)]
    runs = read_runs(folders)
    assert sorted(map(len, seed_groups(runs).values())) == [1, 4, 4]
    table = seeds_table(runs)
    assert table is not None
    row = next(r for r in table.rows if r[1] == "AdamW" and r[2] == "final test loss")
    values = [run.series("test/loss").last for run in runs if run.optimizer == "adamw"]
    assert row[3:5] == [4, pytest.approx(sum(values) / 4)]
    expected = mean_interval(values)
    assert row[5:] == [expected.low, expected.high]
    assert any("below AdamW, outside the noise of the seeds" in note for note in table.notes)
    assert any("single seed on one side" in note for note in table.notes)
    assert seeds_table(runs[:1]) is None
    assert "seeds" in [t.slug for t in build_tables(runs)]


def test_many_settings_are_judged_against_the_best_alone() -> None:
    values = {f"s{n}": [n + seed / 100 for seed in range(4)] for n in range(6)} | {f"one{n}": [9.0] for n in range(5)}
    found = verdicts(values)
    assert len(found) == 7
    assert all(text.startswith("s0 is ") for text in found[:5])
    assert found[5] == "5 settings have a single seed: the noise of their gaps to the others is not known."
    assert "corrected for 15 pairs" in found[6], "the lowest is chosen from the same values, so all pairs count"
    assert corrected_gap(values["s0"], values["s1"], 15).high == pytest.approx(
        float(re.search(r"to (-[\d.]+)", found[0])[1]), abs=5e-4
    )
    assert len(verdicts({name: values[name] for name in ("s0", "s1", "one0")})) == 3


# --- figures ---


def test_the_ratio_panel_always_shows_sqrt_d_and_the_noise_line(runs: list[RunRecord]) -> None:
    panel = next(p for p in panels(runs) if p.slug == "norm-ratio")
    assert [line.y for line in panel.references] == [math.sqrt(124_475_904), NOISE_RATIO * math.sqrt(124_475_904)]
    assert pytest.approx(0.798, abs=5e-4) == NOISE_RATIO
    low, high = panel.y_limits()
    assert low == 0
    assert high > panel.references[0].y
    assert [p.slug for p in panels(runs)] == ["training-loss", "test-loss", "norm-ratio", "perplexity", "kkt-residual"]


def test_colours_mean_optimizers_and_dashes_their_settings(tmp_path: Path) -> None:
    runs = read_runs(
        [write_run(tmp_path / f"{o}{lr}", optimizer=o, lr=lr) for o in ("lion", "sgd") for lr in (1e-3, 2e-3)]
    )
    looks = [(line.colour, line.dash) for line in lines_of(runs)]
    assert looks[0][0] == looks[1][0] != looks[2][0] == looks[3][0]
    assert len(set(looks)) == 4


def test_the_seeds_of_a_setting_are_one_curve_their_mean(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    metrics = folders[1] / "metrics.jsonl"  # the second was interrupted
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["step"] <= 800))
    runs = read_runs(folders)
    panel = next(panel for panel in panels(runs) if panel.slug == "test-loss")
    assert [curve.label for curve in panel.curves] == ["LION, n=2"]
    curve = panel.curves[0]
    assert list(curve.x) == list(range(0, 801, 100)), "the steps that both have"
    both = [run.series("test/loss").values[5] for run in runs]
    assert curve.y[5] == pytest.approx(sum(both) / 2)
    assert [len(y) for _, y in curve.behind] == [11, 9]
    assert max(float(x) for x in re.findall(r"([\d.]+),[\d.]+", chart(panel))) <= WIDTH


def test_curves_by_tokens_and_by_training_time(runs: list[RunRecord]) -> None:
    by_step, by_tokens, by_time = (panels(runs, axis) for axis in ("step", "tokens", "time"))
    assert [p.slug for p in by_step] == [p.slug for p in by_tokens] == [p.slug for p in by_time]
    step, tokens, time = (found[1].curves[0] for found in (by_step, by_tokens, by_time))
    assert step.y == tokens.y == time.y
    assert list(tokens.x) == [x * 16 * 1024 for x in step.x]
    assert list(time.x) == pytest.approx([(runs[0].training_seconds(int(x)) or 0) / 60 for x in step.x])
    assert [found[0].x_label for found in (by_step, by_tokens, by_time)] == [
        "optimizer step", "training tokens", "training minutes",
    ]  # fmt: skip


def test_many_settings_are_drawn_and_the_best_of_each_optimizer_are_named(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"l{n}", lr=n * 1e-4, offset=n / 10) for n in range(1, 15)]
    folders += [write_run(tmp_path / f"s{n}", optimizer="sgd", lr=n / 10) for n in (1, 2)]
    for panel in panels(read_runs(folders)):
        if panel.slug != "learning-rate":
            assert len(panel.curves) == 16
            assert [c.label for c in panel.named] == [f"LION lr={n * 1e-4:g}" for n in range(1, 11)] + [
                "SGD lr=0.1",
                "SGD lr=0.2",
            ]
            assert chart(panel).count('class="curve nameless"') == 4


def test_the_tuning_panel_shows_the_validation_loss_of_each_rate(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"l{n}", lr=10.0**-n, offset=abs(n - 3) / 10) for n in (2, 3, 4)]
    runs = read_runs(folders)
    panel = panels(runs)[-1]
    assert (panel.slug, panel.log_x) == ("learning-rate", True)
    assert list(panel.curves[0].x) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert list(panel.curves[0].y) == [run.valid_loss for run in reversed(runs)]
    assert "learning-rate" not in [p.slug for p in panels(runs[:2])]
    assert panels(runs[:1], "step", runs)[-1].slug == "learning-rate"


@examples(200)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0.1, 1.0))
def test_labels_are_moved_apart_and_keep_their_order(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap, 0.0, 10.0)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    for a, b in pairwise(order):
        assert placed[b] - placed[a] >= gap - 1e-9
    assert min(placed) >= -1e-9
    assert max(placed) <= 10 + 1e-9


def test_png_figures_are_written_without_a_display(runs: list[RunRecord], tmp_path: Path) -> None:
    from PIL import Image

    written = write_figures(runs, tmp_path)
    assert [path.name for path in written] == [
        f"gpt2-small-{slug}.png"
        for slug in ("overview", "training-loss", "test-loss", "norm-ratio", "perplexity", "kkt-residual")
    ]
    for path in written:
        with Image.open(path) as image:
            image.verify()
    with Image.open(written[0]) as image:
        assert image.width > 2.5 * image.height
        colours = {pixel[:3] for _, pixel in image.convert("RGB").getcolors(1 << 24)}
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours


# --- the report ---


class Page(HTMLParser):
    """Collects the addresses that a page would fetch, and checks that its elements close in order."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_that_fetches_nothing(runs: list[RunRecord]) -> None:
    text = render_report(runs, build_tables(runs))
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.count("<svg") == 3 * 5, "by step, by tokens and by time"
    assert text.count('<input class="choice"') == 3
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "0.798 √d: pure noise" in text
    for run in runs:
        assert f"optimizer.lr: {run.settings['optimizer.lr']:g}" in text


def test_names_from_run_folders_cannot_become_markup(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", model="<script>alert(1)</script>")])
    text = render_report(runs, build_tables(runs))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_charts_stay_inside_their_frame(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / f"a_run_with_a_very_long_name_{i}") for i in range(3)])
    for panel in panels(runs):
        text = chart(panel)
        for points in re.findall(r'points="([^"]+)"', text):
            for pair in points.split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= WIDTH
                assert 0 <= y <= HEIGHT
        assert "…" in text


@examples(100)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    values = ticks(low, low + span, 5)
    assert 1 <= len(values) <= 12
    assert all(low - 1e-6 * span <= v <= low + span * (1 + 1e-6) for v in values)


# --- the command ---


def test_compare_prints_tables_and_writes_everything(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "comparison"
    assert main(["compare", *map(str, folders), "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "natural log of the token perplexity" in shown.out
    assert "report.html" in shown.err
    assert {p.name for p in output.iterdir()} >= {
        "report.html", "tables.md", "tables.tex", "log-perplexity.csv", "losses.csv", "gpt2-small-overview.png"
    }  # fmt: skip
    rows = list(csv.reader((output / "log-perplexity.csv").open()))
    assert rows[0] == ["model", "optimizer", "200", "400", "600", "800", "1k"]
    assert [row[1] for row in rows[1:]] == ["LION", "SGD", "AdamW"]
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("form", "mark"), [("markdown", "|---|"), ("csv", "model,optimizer,200"), ("latex", "\\toprule")]
)
def test_other_forms_on_stdout(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, mark: str
) -> None:
    words = ["compare", *map(str, folders), "--output", str(tmp_path / "out"), "--format", form, "--no-figures"]
    assert main(words) == 0
    assert mark in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png"))


def test_mistakes_are_one_line(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty")]) == 4
    assert main(["compare", str(folders[0]), str(folders[0])]) == 2
    (tmp_path / "file").write_text("")
    assert main(["compare", str(folders[0]), "--output", str(tmp_path / "file")]) == 5
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_comparing_needs_neither_torch_nor_megatron(folders: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_lion.cli import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    words = ["compare", *map(str, folders), "--output", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, env=dict(os.environ), timeout=120
    )
