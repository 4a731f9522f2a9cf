"""The measured family: one entry for each run and step, one exponent for each optimizer, part and step; scaling.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError
from megatron_lion.files import make_folder, write_whole
from megatron_lion.scaling.exponent import Exponent, Line, SizeMean, exponent_between_bounds, fit_line
from megatron_lion.scaling.family import Family, FamilyRun
from megatron_lion.scaling.family_steps import run_folder
from megatron_lion.scaling.measure import PARTS, Measurement, PartRatio, longest_probe, measurement

FORMAT = 1
RESULT = "scaling.json"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run at one step."""

    run: FamilyRun
    found: Measurement


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The exponent of one optimizer, part of the model and step.

    Attributes:
        optimizer, part, step: what it is of.
        sizes: means of each size over the seeds.
        exponent: of r without noise, with the verdict.
        measured: line through the r of the averaged gradients, which contain noise.
        noise: line through the r of the noise alone, or None if a probe does not give it.
        noise_shares: smallest and largest share of noise of the probes; None if one is not known.
    """

    optimizer: str
    part: str
    step: int
    sizes: tuple[SizeMean, ...]
    exponent: Exponent
    measured: Line
    noise: Line | None
    noise_shares: tuple[float, float] | None


def read_family(family: Family, output: Path) -> list[Measured]:
    """Reads the measurements of all runs, in the order of the runs and steps.

    Raises:
        CheckpointError: a run or a probe is missing.
        DataError: a probe result is damaged.
    """
    found = []
    for run in family.runs():
        folder = run_folder(run, output)
        for step in family.measure_at:
            content = longest_probe(folder, step)
            if content is None:
                raise CheckpointError(f"{folder}: has no probe of step {step}; --print shows the commands")
            found.append(Measured(run=run, found=measurement(content)))
    return found


def fits_of(measured: Sequence[Measured]) -> list[Fit]:
    """Fits the exponents of all optimizers, parts and steps, in the order in which they first appear."""
    groups = dict.fromkeys((item.run.recipe.optimizer, item.found.step) for item in measured)
    found = []
    for part in PARTS:
        for optimizer, step in groups:
            chosen = [i for i in measured if (i.run.recipe.optimizer, i.found.step) == (optimizer, step)]
            found.append(_fit(optimizer, part, step, chosen))
    return found


def _fit(optimizer: str, part: str, step: int, chosen: Sequence[Measured]) -> Fit:
    by_size: dict[int, list[PartRatio]] = {}
    for item in chosen:
        ratio = item.found.parts[part]
        by_size.setdefault(ratio.d, []).append(ratio)
    sizes = sorted(by_size)
    means = tuple(
        SizeMean(
            d=d,
            measured=_mean_log([ratio.ratio for ratio in by_size[d]]) or 0.0,
            low=_mean_log([ratio.low for ratio in by_size[d]]),
            high=_mean_log([ratio.high for ratio in by_size[d]]),
        )
        for d in sizes
    )
    noise = [_mean_log([ratio.noise_ratio for ratio in by_size[d]]) for d in sizes]
    known = [value for value in noise if value is not None]
    shares = [item.found.noise_share for item in chosen if item.found.noise_share is not None]
    return Fit(
        optimizer=optimizer, part=part, step=step, sizes=means,
        exponent=exponent_between_bounds(means), measured=fit_line(sizes, [mean.measured for mean in means]),
        noise=fit_line(sizes, known) if len(known) == len(sizes) else None,
        noise_shares=(min(shares), max(shares)) if len(shares) == len(chosen) else None,
    )  # fmt: skip


def _mean_log(values: Sequence[float | None]) -> float | None:
    """Mean of the natural logarithms; None if a value is not known."""
    known = [math.log(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def as_content(family: Family, measured: Sequence[Measured], fits: Sequence[Fit]) -> dict[str, Any]:
    """The content of scaling.json."""
    settings = asdict(family)
    return {
        "format": FORMAT,
        "settings": settings,
        "runs": [
            {"run": item.run.name, "optimizer": item.run.recipe.optimizer, "width": item.run.shape.width,
             "depth": item.run.shape.depth, "seed": item.run.seed, "lr": item.run.recipe.lr, **asdict(item.found)}
            for item in measured
        ],
        "fits": [{**asdict(fit), "verdict": fit.exponent.verdict} for fit in fits],
    }  # fmt: skip


def write_results(output: Path, content: dict[str, Any]) -> Path:
    """Writes scaling.json atomically and returns its path.

    Raises:
        StorageError: the file system refused.
    """
    make_folder(output)
    path = output / RESULT
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path
