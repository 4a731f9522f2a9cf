"""Table of `probe --smoothness`, with notes on what a row cannot show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_lion.compare.table import Cell, Table

_COLUMNS = (
    "step", "steps", "‖Δθ‖∞", "‖Δθ‖₂", "loss change", "first order", "curvature", "± (se)", "L∞ low", "L∞ high", "L₂", "± (se) ",
    "noise",
)  # fmt: skip
_LEGEND = (
    "L₂: ‖Δ∇f‖₂/‖Δθ‖₂ without noise. L∞ low and high: bounds on ‖Δ∇f‖₁/‖Δθ‖∞ without noise. Both ratios are lower bounds on the "
    "constants of f. First order: ⟨∇f, Δθ⟩; curvature: ⟨Δ∇f, Δθ⟩, twice what the loss changes beyond first order if f is "
    "quadratic; noise: its share in ‖Δ∇f‖₂²"
)
_FEWEST_GROUPS = 4  # fewer give no standard error, see noise.py


def smoothness_table(results: Sequence[Mapping[str, Any]], *, has_bf16_gradients: bool = False) -> Table:
    """Returns results as a table with one row for each checkpoint.

    Args:
        results: contents of result files.
        has_bf16_gradients: whether the run keeps its gradients in bf16 buffers.
    """
    rows: list[list[Cell]] = []
    for content in results:
        part = content["all"]
        rows.append([
            content["step"], content["num_steps"], part["step_linf"], part["step_l2"], content["loss_change"],
            content["first_order_change"], content["curvature"], content["curvature_standard_error"],
            part["smoothness_linf_low"], part["smoothness_linf_high"], part["smoothness_l2"],
            part["smoothness_l2_standard_error"], part["noise_share"],
        ])  # fmt: skip
    numbers = [name for name in _COLUMNS if name not in ("step", "steps", "noise")]
    return Table(
        slug="smoothness", title="Smoothness along the run's steps", columns=list(_COLUMNS), rows=rows,
        notes=[_LEGEND, *_notes(results, has_bf16_gradients)], num_keys=2,
        formats={"step": "d", "steps": "d", "noise": ".1%"} | dict.fromkeys(numbers, ".4g"),
    )  # fmt: skip


def _notes(results: Sequence[Mapping[str, Any]], has_bf16_gradients: bool) -> list[str]:
    notes = []

    def note(text: str, chosen: Callable[[Mapping[str, Any]], bool]) -> None:
        if steps := [str(content["step"]) for content in results if chosen(content)]:
            notes.append(text.format(", ".join(steps)))

    note(
        "step {}: the loss or its gradient is not finite at one of the ends",
        lambda content: content["loss_change"] is None or content["all"]["change_l1"] is None,
    )
    note(
        "step {}: no weight changed (rate 0, or every step was skipped), so the smoothness is undefined",
        lambda content: content["all"]["step_linf"] == 0,
    )
    note(
        "step {}: some of the steps were skipped, because a gradient was not finite; the others were taken",
        lambda content: 0 < content["skipped_steps"] < content["num_steps"],
    )
    note(
        "step {}: too few batches for a standard error (it needs 4), so the values may be noise; give more --num-batches",
        lambda content: (
            (content["all"]["num_groups"] or 0) < _FEWEST_GROUPS and content["all"]["change_l1"] is not None
        ),
    )
    note(
        "step {}: the change of the gradient is not resolved from noise; give more --num-batches, or more steps",
        lambda content: content["all"]["is_resolved"] is False,
    )
    if results and (precision := results[0]["precision"]) != "fp32":
        notes.append(
            f"in {precision}, weights and activations are rounded, and the change of the gradient contains the change of the "
            "rounding; more steps make its share smaller"
        )
    if has_bf16_gradients:
        notes.append(
            "the run adds up its gradients in bf16 (train.accumulate_allreduce_grads_in_fp32 false), these steps in fp32: they are "
            "the run's steps up to this rounding"
        )
    return notes
