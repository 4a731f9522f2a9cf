"""Figure of `probe --smoothness`: the quadratic term of each step with its two bounds, and the smoothness constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors
from megatron_lion.intervals import t_quantile
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.runs.smoothness_files import read_all_smoothness
from megatron_lion.style import GREY, OPTIMIZER_COLOURS, new_figure, save_figure, style_axes

DPI = 110


def draw_smoothness(run_dirs: Sequence[str | Path], num_steps: int) -> Path:
    """Draws RUN/figures/smoothness.png of the first run, with further runs beside it, and returns its path.

    Args:
        run_dirs: the runs.
        num_steps: results over this number of steps are drawn; of several at one checkpoint, that of the most batches.

    Raises:
        DataError: a run has no such result, or one is damaged.
        StorageError: the folder cannot be written.
    """
    folder = Path(run_dirs[0]) / "figures"
    found = [_results(run_dir, num_steps) for run_dir in run_dirs]
    names = [OPTIMIZER_NAMES.get(results[-1]["optimizer"], results[-1]["optimizer"]) for results in found]
    figure, axes = new_figure(11.5, 5.0, 2, dpi=DPI)
    for panel in axes:
        style_axes(panel, box=True, tick_size=9)
    for place, (run_dir, results) in enumerate(zip(run_dirs, found, strict=True)):
        label = names[place] if names.count(names[place]) == 1 else f"{names[place]} ({Path(run_dir).name})"
        # Side by side: bars of several runs at one step would cover each other.
        shift = 0.012 * (place - (len(found) - 1) / 2) * max(1, *(item["step"] for item in results))
        color = OPTIMIZER_COLOURS.get(str(results[-1]["optimizer"]), GREY)
        steps = [item["step"] + shift for item in results]
        _terms(axes[0], steps, results, color, label)
        _constants(axes[1], steps, results, color, label)
    way = "one step" if num_steps == 1 else f"{num_steps} steps"
    axes[0].set(xlabel="checkpoint", ylabel="nats", yscale="log")
    axes[0].set_title(f"Quadratic term of {way}, and its bounds in both norms", fontsize=10)
    axes[1].set(xlabel="checkpoint", ylabel="loss / θ²", yscale="log")
    axes[1].set_title("Smoothness along the run; bars: 95 % of L₂, range of L∞", fontsize=10)
    every = sorted({item["step"] for results in found for item in results})
    for panel in axes:
        if len(every) <= 10:  # otherwise matplotlib's own ticks
            panel.set_xticks(every, [f"{step:,}" for step in every])
        panel.margins(x=0.15)
        # Below the axes: inside it covers points of several runs.
        panel.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=len(found), frameon=False)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, folder / "smoothness.png")


def _results(run_dir: str | Path, num_steps: int) -> list[Mapping[str, Any]]:
    by_step: dict[int, Mapping[str, Any]] = {}
    for item in read_all_smoothness(run_dir):
        if item["num_steps"] == num_steps and item["all"]["step_linf"]:
            known = by_step.get(item["step"])
            if known is None or item["num_batches"] > known["num_batches"]:
                by_step[item["step"]] = item
    if not by_step:
        raise DataError(
            f"{run_dir}: no result over {num_steps} step(s) that moved the weights; run `megatron-lion probe {run_dir} "
            f"--smoothness {num_steps}`"
        )
    return [by_step[step] for step in sorted(by_step)]


def _terms(axes: Any, steps: list[float], results: list[Mapping[str, Any]], color: str, label: str) -> None:
    """½⟨Δ∇f, Δθ⟩ with its 95 % interval, ½‖Δ∇f‖₁‖Δθ‖∞ as a range, and ½‖Δ∇f‖₂‖Δθ‖₂."""
    parts = [item["all"] for item in results]
    _points(axes, steps, [item["curvature"] / 2 for item in results], "o", color, f"{label}: ½⟨Δ∇f, Δθ⟩")
    halves = [item["curvature_standard_error"] for item in results]
    for step, item, error in zip(steps, results, halves, strict=True):
        if error is not None and item["curvature"] > 0:
            half = t_quantile(item["num_blocks"] - 1) * error / 2
            axes.errorbar([step], [item["curvature"] / 2], yerr=[[min(half, 0.99 * item["curvature"] / 2)], [half]],
                          fmt="none", ecolor=color, capsize=3)  # fmt: skip
    _ranges(axes, steps, [
        (part["change_l1_low"], part["change_l1_high"], part["step_linf"] / 2) for part in parts
    ], color, f"{label}: ½‖Δ∇f‖₁‖Δθ‖∞")  # fmt: skip
    euclidean = [_product(part["change_l2_corrected"], part["step_l2"] / 2) for part in parts]
    _points(axes, steps, euclidean, "s", color, f"{label}: ½‖Δ∇f‖₂‖Δθ‖₂")


def _constants(axes: Any, steps: list[float], results: list[Mapping[str, Any]], color: str, label: str) -> None:
    """L₂ with its 95 % interval, and the range of L∞/d."""
    parts = [item["all"] for item in results]
    d = parts[-1]["num_parameters"]
    _points(axes, steps, [part["smoothness_l2"] for part in parts], "s", color, f"{label}: L₂")
    for step, part in zip(steps, parts, strict=True):
        value, error = part["smoothness_l2"], part["smoothness_l2_standard_error"]
        if value and error is not None:
            half = t_quantile(part["num_groups"] - 1) * error
            axes.errorbar(
                [step], [value], yerr=[[min(half, 0.99 * value)], [half]], fmt="none", ecolor=color, capsize=3
            )
    _ranges(axes, steps, [
        (part["smoothness_linf_low"], part["smoothness_linf_high"], 1 / d) for part in parts
    ], color, f"{label}: L∞/d, d = {d:,}")  # fmt: skip


def _points(axes: Any, steps: list[float], values: list[float | None], marker: str, color: str, label: str) -> None:
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None and value > 0]
    if known:  # a logarithmic axis has no place for the others
        axes.plot(*zip(*known, strict=True), marker, color=color, markersize=4, linestyle="none", label=label)


def _ranges(
    axes: Any, steps: list[float], ends: list[tuple[float | None, float | None, float]], color: str, label: str
) -> None:
    for step, (low, high, factor) in zip(steps, ends, strict=True):
        if low and high:
            axes.plot([step, step], [low * factor, high * factor], color=color, linewidth=5, alpha=0.35,
                      solid_capstyle="butt", marker="_", markersize=9, markeredgewidth=1.5, label=label)  # fmt: skip
            label = "_"


def _product(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
