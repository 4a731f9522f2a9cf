"""Figures of the probes of one run, or of comparable runs: norm ratio over training, ladder, layers and kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors
from megatron_lion.gradient.norms import GAUSSIAN_RATIO
from megatron_lion.gradient.parameter_kinds import KINDS, kind_of, layer_of
from megatron_lion.intervals import t_quantile
from megatron_lion.runs.probes import longest_ladder, read_probes
from megatron_lion.style import GREY, OPTIMIZER_COLOURS, new_figure, reference_line, save_figure, style_axes

DPI = 110


def draw_runs(run_dirs: Sequence[str | Path]) -> list[Path]:
    """Draws all figures of runs of the same size into the first run's folder figures/ and returns their paths.

    Args:
        run_dirs: the run, followed by runs to draw in the same axes.

    Raises:
        DataError: a run has no probe results, or the models differ in size.
        StorageError: the folder cannot be written.
    """
    folder = Path(run_dirs[0]) / "figures"
    found = [read_probes(run_dir) for run_dir in run_dirs]
    sizes = {int(probe["all"]["num_parameters"]) for probes in found for probe in probes}
    if len(sizes) > 1:
        raise DataError(
            f"{', '.join(map(str, run_dirs))}: models of {', '.join(map(str, sorted(sizes)))} parameters; one figure shows one size"
        )
    names = [str(probes[-1]["optimizer"]).upper() for probes in found]
    labels = [
        name if names.count(name) == 1 else f"{name} ({Path(run_dir).name})"
        for name, run_dir in zip(names, run_dirs, strict=True)
    ]
    runs = dict(zip(labels, found, strict=True))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [plot_ratio(runs, folder / "probe_ratio.png")]
    for place, (label, run_dir) in enumerate(zip(labels, run_dirs, strict=True)):
        name = "probe_layers.png" if place == 0 else f"probe_layers_{Path(run_dir).name}.png"
        paths.append(plot_layers(runs[label], folder / name, label))
    with_ladder = {
        label: [longest_ladder(run_dir, probe) for probe in (runs[label][0], runs[label][-1])]
        for label, run_dir in zip(labels, run_dirs, strict=True)
        if runs[label][-1]["ladder"]
    }
    if with_ladder:
        paths.append(plot_ladder(with_ladder, folder / "probe_ladder.png"))
    return paths


def plot_ratio(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Plots r = ‖∇f‖₁/‖∇f‖₂ over the steps with √d and the noise's own r, and r/√d with and without embeddings.

    The bounds on r without noise are shaded.
    """
    figure, (left, right) = _figure(2)
    d = _same_d(runs)
    for label, probes in runs.items():
        steps = [probe["step"] for probe in probes]
        color = _color(probes, label)
        ratios = [_nan(probe["all"]["norm_ratio"]) for probe in probes]
        left.plot(steps, ratios, "o-", color=color, label=label)
        _bars(left, steps, ratios, [_last_error(probe) for probe in probes], color)
        _bounds(left, probes, _noises(probes), color)
        _noise_ratios(left, probes, color, label)
        singles = [
            (probe["step"], _nan(probe["ladder"][0]["norm_ratio"])) for probe in probes if len(probe["ladder"]) > 1
        ]
        if singles:
            style = ":" if len(singles) > 1 else "x"
            left.plot(*zip(*singles, strict=True), style, color=color, label=f"{label}, one batch only")
        for part, style, text in (("all", "o-", "all parameters"), ("without_embeddings", "s--", "without embeddings")):
            values = [_nan(probe[part]["norm_ratio_over_sqrt_d"]) for probe in probes]
            right.plot(steps, values, style, color=color, markersize=4, label=f"{label}, {text}")
            _bounds(
                right, probes, _noises(probes, part), color, sizes=[probe[part]["num_parameters"] for probe in probes]
            )
    _reference_lines(left, d, is_measured=_all_measured(runs))
    batches = sorted({probe["num_batches"] for probes in runs.values() for probe in probes})
    left.set(xlabel="step", ylabel="r = ‖∇f‖₁ / ‖∇f‖₂", ylim=(0, 1.08 * math.sqrt(d)))
    left.set_title(
        f"Norm ratio, mean of {' or '.join(map(str, batches))} batches, d = {d:,}\n"
        "bars: 95 % of r; shaded: bounds on r without noise",
        fontsize=9,
    )
    if not _all_measured(runs):
        reference_line(right, GAUSSIAN_RATIO, "0.798: pure Gaussian noise", "-.")
    right.set(xlabel="step", ylabel="r / √d, each with its own d", ylim=(0, 1.08))
    right.set_title("The same as a share of its upper bound", fontsize=10)
    for axes in (left, right):
        axes.legend(fontsize=8, loc="best")
    return save_figure(figure, path)


def plot_ladder(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Plots r against the number of averaged batches for each run's first and last probe, with 95 % intervals.

    A value without a standard error is an open circle without a bar. The axis on top shows how many groups of batches
    the bars of the longest ladder rest on. Broad bars beside the last rung are the bounds on r
    without noise, from all batches.
    """
    figure, (axes,) = _figure(1)
    longest: list[Mapping[str, Any]] = []
    num_beside = 0
    for label, probes in runs.items():
        color = _color(probes, label)
        shown = [probe for probe in (probes[0], probes[-1]) if probe["ladder"]]
        for probe, style in zip(shown, ("--", "-"), strict=False):
            rungs = probe["ladder"]
            longest = max(longest, rungs, key=len)
            batches, ratios = [rung["num_batches"] for rung in rungs], [_nan(rung["norm_ratio"]) for rung in rungs]
            errors = list(map(_interval_half, rungs))
            axes.plot(batches, ratios, style, color=color, label=f"{label}, step {probe['step']:,}")
            for k, ratio, error in zip(batches, ratios, errors, strict=True):
                face = color if error is not None else "none"
                axes.plot([k], [ratio], "o", markersize=4, color=color, markerfacecolor=face)
            _bars(axes, batches, ratios, errors, color)
            noise = probe.get("noise") or {}
            low, high = noise.get("norm_ratio_low"), noise.get("norm_ratio_high")
            if low is not None and high is not None:  # side by side, right of the last rung
                num_beside += 1
                place = batches[-1] * 1.12**num_beside * 1.1
                axes.plot(
                    [place, place], [low, high], style, color=color, linewidth=5, alpha=0.35, solid_capstyle="butt"
                )
            if noise.get("norm_ratio_noise") is not None:
                axes.axhline(noise["norm_ratio_noise"], color=color, linestyle=":", linewidth=1)
    _reference_lines(axes, _same_d(runs), is_measured=_all_measured(runs))
    axes.set(
        xlabel="averaged global batches k (open: no error known)",
        ylabel="r(k)",
        ylim=(0, 1.08 * math.sqrt(_same_d(runs))),
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    top = axes.secondary_xaxis("top")
    known = [rung for rung in longest if _error(rung) is not None]
    top.set_xticks([rung["num_batches"] for rung in known], [str(rung["num_groups"]) for rung in known], fontsize=7)
    top.minorticks_off()
    top.set_xlabel("groups of batches behind the bar", fontsize=8)
    axes.set_title(
        "Norm ratio of the mean of k batches; bars: 95 % interval\n"
        "broad bars: bounds on r without noise; dotted: r of the noise itself",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="best")
    return save_figure(figure, path)


def plot_layers(probes: Sequence[Mapping[str, Any]], path: Path, label: str) -> Path:
    """Plots r/√d of each layer over the steps, and of each layer and parameter kind at the last probe.

    Below each value are the bounds on that of the gradient without noise; "noise" if the signal is not resolved.
    """
    import numpy as np

    layers = list(probes[-1]["layers"])
    over_time = np.array(
        [[_nan(probe["layers"][layer]["norm_ratio_over_sqrt_d"]) for probe in probes] for layer in layers]
    )
    grid, kinds = _layer_by_kind(probes[-1], layers)
    parts = [probe.get("noise_by_part") or {} for probe in probes]
    cells = [[part.get("layers", {}).get(layer) for part in parts] for layer in layers]
    by_kind = parts[-1].get("layers_by_kind", {})
    kind_cells = [[by_kind.get(layer, {}).get(kind) for kind in kinds] for layer in layers]
    widths = [max(4, len(probes)), len(kinds) + 1]
    figure, (left, right) = new_figure(9.5, 0.32 * len(layers) + 1.9, 2, dpi=DPI, width_ratios=widths)
    for axes, values, bounds, names, title in (
        (left, over_time, cells, [f"{probe['step']:,}" for probe in probes], "over training (step)"),
        (right, grid, kind_cells, kinds, f"by kind, step {probes[-1]['step']:,}"),
    ):
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=45 if len(names) > 6 else 0)
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        axes.set_title(title, fontsize=9)
        if values.size <= 150:
            for (row, column), value in np.ndenumerate(values):
                if not np.isnan(value):
                    shade = "white" if value < 0.55 else "black"
                    text = f"{value:.2f}{_bounds_text(bounds[row][column])}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color=shade)
    bar = figure.colorbar(image, ax=[left, right], shrink=0.9)
    bar.ax.set_ylabel("r/√d of the part", fontsize=7)
    figure.suptitle(
        f"{label}: norm ratio by part of the network, each with its own d; below: bounds without noise", fontsize=9
    )
    return save_figure(figure, path)


def _layer_by_kind(probe: Mapping[str, Any], layers: list[str]) -> tuple[Any, list[str]]:
    import numpy as np

    sums: dict[tuple[str, str], list[float]] = {}
    for name, norms in probe["parameters"].items():
        if norms["grad_l1"] is None or norms["grad_l2"] is None:
            continue
        cell = sums.setdefault((layer_of(name), kind_of(name)), [0.0, 0.0, 0.0])
        for index, value in enumerate((norms["grad_l1"], norms["grad_l2"] ** 2, norms["num_parameters"])):
            cell[index] += value
    kinds = [kind for kind in KINDS if any(kind == found for _, found in sums)]
    grid = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), (l1, squares, count) in sums.items():
        if squares > 0:
            grid[layers.index(layer), kinds.index(kind)] = l1 / math.sqrt(squares * count)
    return grid, kinds


def _figure(columns: int) -> tuple[Any, list[Any]]:
    figure, row = new_figure(5.6 * columns + 0.8, 4.0, columns, dpi=DPI)
    for axes in row:
        style_axes(axes, box=True, tick_size=10)
    return figure, row


def _reference_lines(axes: Any, d: int, *, is_measured: bool) -> None:
    """Draws √d and, unless the noise's own r was measured, the r of even Gaussian noise."""
    lines = ((1.0, "√d"), (GAUSSIAN_RATIO, "0.798 √d: pure Gaussian noise"))
    for factor, text in lines[:1] if is_measured else lines:
        height = factor * math.sqrt(d)
        reference_line(axes, height, f"{text} = {height:,.0f}", "-" if factor == 1.0 else "-.")


def _same_d(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    found = {int(probe["all"]["num_parameters"]) for probes in runs.values() for probe in probes}
    assert len(found) == 1, "one figure shows models of one size"
    return found.pop()


def _error(rung: Mapping[str, Any]) -> float | None:
    """Standard error of a rung's r; None if it is not known, as in results of versions that stored a spread of two groups."""
    error = rung.get("norm_ratio_standard_error")
    return None if error is None else float(error)


def _interval_half(rung: Mapping[str, Any]) -> float | None:
    """Half the 95 % interval of a rung's r, by Student's quantile for its number of groups."""
    error = _error(rung)
    return None if error is None else t_quantile(rung["num_groups"] - 1) * error


def _last_error(probe: Mapping[str, Any]) -> float | None:
    return _interval_half(probe["ladder"][-1]) if probe["ladder"] else None


def _bars(
    axes: Any, places: Sequence[float], values: Sequence[float], halves: Sequence[float | None], color: str
) -> None:
    """Draws the bars that are known; an unknown one is not drawn, rather than as zero."""
    known = [(x, y, half) for x, y, half in zip(places, values, halves, strict=True) if half is not None]
    if known:
        x, y, half = zip(*known, strict=True)
        axes.errorbar(x, y, yerr=half, fmt="none", ecolor=color, capsize=3)


def _noises(probes: Sequence[Mapping[str, Any]], part: str = "all") -> list[Mapping[str, Any]]:
    """The noise of all coordinates, or of a part, at each probe; empty if it is not known."""
    if part == "all":
        return [probe.get("noise") or {} for probe in probes]
    return [(probe.get("noise_by_part") or {}).get(part) or {} for probe in probes]


def _noise_ratios(axes: Any, probes: Sequence[Mapping[str, Any]], color: str, label: str) -> None:
    """Draws the r of the noise itself as a dotted line."""
    known = [
        (probe["step"], noise["norm_ratio_noise"])
        for probe, noise in zip(probes, _noises(probes), strict=True)
        if noise.get("norm_ratio_noise") is not None
    ]
    if known:
        axes.plot(*zip(*known, strict=True), ":", marker=".", color=color, linewidth=1, label=f"{label}, noise alone")


def _all_measured(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Whether the noise's own r is known of each run, so that no model of the noise is needed."""
    return all(any(noise.get("norm_ratio_noise") is not None for noise in _noises(probes)) for probes in runs.values())


def _bounds_text(part: Mapping[str, Any] | None) -> str:
    """The bounds on r/√d of a part as a second line; empty if its noise was not measured."""
    if not part or part.get("is_resolved") is None:
        return ""
    low, high, root = part.get("norm_ratio_low"), part.get("norm_ratio_high"), math.sqrt(part["num_parameters"])
    return "\nnoise" if low is None or high is None else f"\n{low / root:.2f}–{high / root:.2f}"


def _bounds(
    axes: Any,
    probes: Sequence[Mapping[str, Any]],
    noises: Sequence[Mapping[str, Any]],
    color: str,
    sizes: Sequence[int] | None = None,
) -> None:
    """Shades the bounds on the noise-free r, or r/√d of parts of these sizes, between the probes at which they are known."""
    roots = [1.0] * len(probes) if sizes is None else [math.sqrt(size) for size in sizes]
    low, high = (
        [_nan(noise.get(f"norm_ratio_{end}")) / root for noise, root in zip(noises, roots, strict=True)]
        for end in ("low", "high")
    )
    axes.fill_between([probe["step"] for probe in probes], low, high, color=color, alpha=0.12, linewidth=0)


def _color(probes: Sequence[Mapping[str, Any]], label: str) -> str:
    return OPTIMIZER_COLOURS.get(str(probes[-1]["optimizer"]), GREY)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
