"""The tables of a measured family: exponents with their verdicts, and all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_lion.compare.table import MISSING, Cell, Table, to_markdown
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.scaling.exponent import TOLERANCE
from megatron_lion.scaling.family import Family
from megatron_lion.scaling.family_results import Fit, Measured
from megatron_lion.scaling.measure import PARTS, PartRatio


def fit_table(fits: Sequence[Fit]) -> Table:
    """One row for each exponent."""
    rows: list[list[Cell]] = []
    for fit in fits:
        found = fit.exponent
        rows.append([
            OPTIMIZER_NAMES[fit.optimizer], PARTS[fit.part], fit.step, _pair(found.set_low, found.set_high),
            _pair(found.low, found.high), f"{fit.measured.slope:.2f} ({_pair(fit.measured.low, fit.measured.high)})",
            MISSING if fit.noise is None else f"{fit.noise.slope:.2f}", _shares(fit.noise_shares), found.verdict,
        ])  # fmt: skip
    reasons = dict.fromkeys(fit.exponent.reason for fit in fits if fit.exponent.reason)
    return Table(
        slug="exponents", title="Exponent b of r ∝ d^b",
        columns=["optimizer", "part", "step", "b without noise", "95 % interval", "b of measured r", "b of noise", "noise share",
                 "verdict on ½"],
        rows=rows, num_keys=3,
        notes=[
            "b without noise: exponents that the bounds on r leave; the interval adds the scatter between sizes",
            f"holds: the interval is inside ½ ± {TOLERANCE:g} (our choice); does not hold here: it excludes ½; each part has its own d",
            "b of measured r (and its 95 % interval) contains noise, whose own r of 0.798 √d has the exponent ½",
            *(f"not resolved: {reason}" for reason in reasons),
        ],
    )  # fmt: skip


def run_table(measured: Sequence[Measured], optimizer: str) -> Table:
    """One row for each run and step of an optimizer."""
    columns = ["width", "depth", "seed", "step", "lr", "loss", "batches", "passes", "noise share"]
    for name in ("", " w/o emb.", " emb."):
        columns += [f"d{name}", f"r{name}", f"r{name} without noise"]
    rows: list[list[Cell]] = []
    for item in measured:
        if item.run.recipe.optimizer != optimizer:
            continue
        run, found = item.run, item.found
        row: list[Cell] = [
            run.shape.width, run.shape.depth, run.seed, found.step, run.recipe.lr, found.loss, found.num_batches,
            found.passes, found.noise_share,
        ]  # fmt: skip
        for name in PARTS:
            part = found.parts[name]
            row += [part.d, _with_error(part), _bounds(part)]
        rows.append(row)
    return Table(
        slug=f"runs-{optimizer}", title=f"{OPTIMIZER_NAMES[optimizer]}: runs", columns=columns, rows=rows, num_keys=4,
        formats={"lr": ".3g", "loss": ".3f", "passes": ".3f", "noise share": ".1%"},
        notes=[
            "passes: over the training data, by the probe; noise share: of the squared norm of the averaged gradient, all parameters; "
            "±: standard error, of the parts the whole model's relative one"
        ],
    )  # fmt: skip


def as_markdown(family: Family, measured: Sequence[Measured], fits: Sequence[Fit], figure: str) -> str:
    """The text of scaling.md."""
    tables = [run_table(measured, recipe.optimizer) for recipe in family.recipes]
    above = sum(1 for item in measured if (item.found.noise_share or 0.0) > family.noise_share)
    lines = [
        "# The exponent of the norm ratio",
        "",
        f"r = ‖∇f‖₁/‖∇f‖₂ of {len(family.shapes)} models, {family.steps:,} steps each. The noise share aimed at is "
        f"{family.noise_share:.0%}, with at most {family.max_batches} batches a probe; {above} of {len(measured)} probes are above it.",
        "",
        f"![r against d]({figure})",
        "",
        to_markdown(fit_table(fits)),
        *(to_markdown(table) for table in tables),
    ]
    return "\n".join(lines)


def _pair(low: float | None, high: float | None) -> str:
    return MISSING if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _shares(shares: tuple[float, float] | None) -> str:
    return MISSING if shares is None else f"{shares[0]:.0%}–{shares[1]:.0%}"


def _with_error(part: PartRatio) -> str:
    error = "" if part.ratio_error is None else f" ± {part.ratio_error:.2g}"
    return f"{part.ratio:.2f}{error} ({part.ratio / math.sqrt(part.d):.3f} √d)"


def _bounds(part: PartRatio) -> str:
    return MISSING if part.low is None or part.high is None else f"{part.low:.2f}–{part.high:.2f}"
