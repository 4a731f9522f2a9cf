"""The error bars of r in the figures and the report of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.compare.chart import Panel
from megatron_lion.compare.panels import panels
from megatron_lion.compare.png_figures import write_figures
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.svg_charts import HEIGHT, chart

T_7, T_15 = (
    2.3646242510,
    2.1314495456,
)  # two-sided 95 % of Student's t, from a printed table (Abramowitz and Stegun 26.10)


def add_errors(folder: Path, errors: Mapping[int, tuple[float | None, int]]) -> Path:
    """Adds a standard error of r and its number of groups to the probes at some steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line in lines:
        if "probe/norm_ratio" in line and line["step"] in errors:
            error, groups = errors[line["step"]]
            line |= {"probe/norm_ratio_standard_error": error, "probe/noise_groups": groups}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def ratio_panel(*folders: Path) -> Panel:
    return next(panel for panel in panels(read_runs(list(folders))) if panel.slug == "norm-ratio")


def test_bars_are_student_intervals_and_unknown_ones_are_open(tmp_path: Path) -> None:
    errors: dict[int, tuple[float | None, int]] = {0: (100.0, 8), 200: (50.0, 16), 400: (None, 16), 600: (30.0, 1)}
    panel = ratio_panel(add_errors(write_run(tmp_path / "a"), errors))
    curve = panel.curves[0]
    assert curve.bars[:2] == pytest.approx([100 * T_7, 50 * T_15])
    assert list(curve.bars[2:]) == [None] * 4, "no error, one group, and probes of an earlier version"
    assert curve.open_marks == [False, False, True, True, True, True]
    assert curve.intervals[0] == pytest.approx((0, curve.y[0] - 100 * T_7, curve.y[0] + 100 * T_7))
    assert panel.y_label.endswith("; bars: 95 %; open: no error known")


def test_the_axis_names_only_what_is_drawn(tmp_path: Path) -> None:
    every = dict.fromkeys(range(0, 1001, 200), (10.0, 8))
    assert ratio_panel(add_errors(write_run(tmp_path / "a"), every)).y_label.endswith("₂; bars: 95 %")
    assert ratio_panel(write_run(tmp_path / "b")).y_label.endswith("₂; open: no error known")


def test_the_bar_of_a_mean_over_seeds_does_not_average_out(tmp_path: Path) -> None:
    """Seeds may be probed with the same batches; then their errors are equal, and so is the error of the mean."""
    folders = [
        add_errors(write_run(tmp_path / f"{seed}", seed=seed), {0: (100.0, 8), 200: (50.0, 8)}) for seed in (1, 2)
    ]
    add_errors(folders[1], {200: (None, 8)})
    curve = ratio_panel(*folders).curves[0]
    assert curve.bars[0] == pytest.approx(100 * T_7)
    assert curve.bars[1] is None, "the error of one seed is not known"


def test_a_wide_bar_widens_the_axis(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    narrow = ratio_panel(folder).y_limits()
    wide = ratio_panel(add_errors(folder, {0: (8000.0, 8)})).y_limits()
    assert wide[1] > 8000 * T_7 > narrow[1]


def test_the_report_draws_bars_and_states_them_in_the_tooltip(tmp_path: Path) -> None:
    panel = ratio_panel(add_errors(write_run(tmp_path / "a"), {0: (400.0, 8), 200: (500.0, 16)}))
    text = chart(panel)
    bars = re.findall(r'<line class="bar" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"/>', text)
    circles = re.findall(r'<circle(?P<open> class="open")? cx="([\d.]+)" cy="([\d.]+)"', text)
    assert len(bars) == 2
    assert [bool(mark) for mark, *_ in circles] == [False, False, True, True, True, True]
    for (x1, x2, low, high), (_, x, y) in zip(bars, circles, strict=False):
        assert x1 == x2 == x
        assert HEIGHT > float(low) > float(y) > float(high) > 0
        assert float(low) - float(y) == pytest.approx(float(y) - float(high), abs=0.11)
    low = float(bars[1][2]) - float(bars[1][3])
    assert low / (float(bars[0][2]) - float(bars[0][3])) == pytest.approx(500 * T_15 / (400 * T_7), abs=0.02)
    assert "± 946 (95 %)" in text
    assert text.count("(95 %)") == 2


def test_other_panels_have_no_bars_and_no_open_marks(tmp_path: Path) -> None:
    runs = read_runs([add_errors(write_run(tmp_path / "a"), {0: (400.0, 8)})])
    for panel in panels(runs):
        if panel.slug != "norm-ratio":
            assert 'class="bar"' not in chart(panel)
            assert 'class="open"' not in chart(panel)


def test_the_png_draws_the_bars(tmp_path: Path) -> None:
    """Pixels: the figure with bars differs from the one without only by bars and marks, so the former has more ink."""
    image = pytest.importorskip("matplotlib.image")
    import numpy as np

    def ink(folder: Path) -> int:
        (folder / "out").mkdir()
        files = write_figures(read_runs([folder]), folder / "out")
        pixels = image.imread(next(file for file in files if file.name.endswith("norm-ratio.png")))[..., :3]
        saturation = pixels.max(axis=-1) - pixels.min(axis=-1)  # curves are coloured, axes and text of axes are grey
        return int(np.count_nonzero(saturation > 0.2))

    every: dict[int, tuple[float | None, int]] = dict.fromkeys(range(0, 1001, 200), (500.0, 8))
    tiny: dict[int, tuple[float | None, int]] = dict.fromkeys(range(0, 1001, 200), (0.001, 8))
    long = ink(add_errors(write_run(tmp_path / "a" / "lion"), every))
    short = ink(add_errors(write_run(tmp_path / "b" / "lion"), tiny))
    assert long > short + 6 * 40


def add_bounds(folder: Path, bounds: dict[int, tuple[float, float, float]]) -> Path:
    """Gives the probes at some steps bounds on r without noise and the r of the noise."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "probe/norm_ratio" in line and line["step"] in bounds:
            for name, value in zip(("low", "high", "noise"), bounds[line["step"]], strict=True):
                line[f"probe/norm_ratio_{name}"] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_bounds_without_noise_are_shaded_and_the_noise_has_its_own_line(tmp_path: Path) -> None:
    bounds = {0: (1500.0, 9000.0, 700.0), 200: (1600.0, 2500.0, 710.0), 400: (1700.0, 2600.0, 720.0)}
    panel = ratio_panel(add_bounds(write_run(tmp_path / "a"), bounds))
    curve, noise = panel.curves
    assert [ends for ends in curve.band if ends] == [bounds[step][:2] for step in bounds]
    assert list(noise.y) == [700.0, 710.0, 720.0]
    assert not noise.label
    assert noise.dash
    assert panel.y_limits()[1] > 9000, "the bounds are inside the axes"
    assert [line.label.split(" =")[0] for line in panel.references] == ["√d"], "no model of the noise is needed"
    assert panel.y_label.endswith("shaded: without noise; dotted: noise alone")
    text = chart(panel)
    assert len(re.findall('<polygon class="bounds"', text)) == 1
    assert "without noise 1,500 to 9,000" in text


def test_the_bounds_of_seeds_are_the_means_of_their_bounds(tmp_path: Path) -> None:
    ends = [(1000.0, 3000.0, 9.0), (2000.0, 5000.0, 9.0)]
    folders = [
        add_bounds(write_run(tmp_path / f"s{seed}", seed=seed), {0: value, 200: value})
        for seed, value in enumerate(ends, start=1)
    ]
    assert [found for found in ratio_panel(*folders).curves[0].band if found] == [(1500.0, 4000.0)] * 2


def test_a_run_without_the_noises_ratio_shows_the_gaussian_line(tmp_path: Path) -> None:
    assert any("0.798" in line.label for line in ratio_panel(write_run(tmp_path / "a")).references)


def test_a_long_axis_name_is_divided_into_lines_that_fit(tmp_path: Path) -> None:
    bounds = {0: (1500.0, 9000.0, 700.0), 200: (1600.0, 2500.0, 710.0)}
    folder = add_bounds(write_run(tmp_path / "a"), bounds)
    panel = ratio_panel(add_errors(folder, {0: (400.0, 8), 200: (None, 8)}))
    assert len(panel.y_label) > 80, "bars, open marks, bounds and the noise are drawn"
    assert " ".join(panel.y_lines(40)) == panel.y_label
    names = re.findall(r'<text class="axis" x="4.0" y="([\d.]+)" text-anchor="start">([^<]+)</text>', chart(panel))
    assert [float(y) for y, _ in names] == [32.0, 46.0]
    assert max(len(text) for _, text in names) <= 64
