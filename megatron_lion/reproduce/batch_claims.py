"""Claims on the number of batches of the full gradient: whether r of 1,000 or 5,000 batches is that of 100."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError
from megatron_lion.intervals import LEVEL, t_quantile
from megatron_lion.reproduce.artefacts import BATCHES, QUICK_BATCHES, Plan
from megatron_lion.reproduce.claim import Claim
from megatron_lion.runs.paths import probes_folder, step_name
from megatron_lion.runs.probes import read_probe
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.runs.steps import list_steps

TOLERANCE = 1.1
"""Largest factor between two r that counts as no change; our choice, the paper states the outcome in words."""


def batch_claims(plan: Plan) -> list[Claim]:
    """One statement for each run and each larger number of batches, at the run's last checkpoint.

    Raises:
        CheckpointError: a run or a probe is missing.
        DataError: a probe result is damaged.
    """
    found = []
    for name, folder in {**plan.paper_runs, **plan.tuned_runs}.items():
        results = _results(folder)
        counts = [count for count in (*BATCHES, *QUICK_BATCHES) if count in results]
        if len(counts) < 2:
            raise CheckpointError(f"{folder}: lacks probes of several numbers of batches; give the same command again")
        model, _, optimizer = name.partition("/")
        base = results[min(counts)]
        found += [
            _claim(f"{model.replace('gpt2', 'GPT-2')}, {OPTIMIZER_NAMES[optimizer]}", base, results[count])
            for count in sorted(counts)[1:]
        ]
    return found


def _results(folder: Path) -> dict[int, dict[str, Any]]:
    """Results of the last checkpoint by number of batches; those at frozen parameters without dropout."""
    steps = list_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder}: has no checkpoint; give the same command again")
    paths = probes_folder(folder).glob(f"{step_name(steps[-1])}*.json")
    contents = [read_probe(path) for path in sorted(paths)]
    alike = [content for content in contents if content["mode"] == "frozen" and not content["dropout"]]
    return {int(content["num_batches"]): content for content in alike}


def _claim(name: str, base: dict[str, Any], other: dict[str, Any]) -> Claim:
    """Whether r of `other` is that of `base`, whose batches are among those of `other`.

    The errors count as independent. Those of a sample and of a part of it are positively correlated, so the interval of
    the factor is too wide rather than too narrow.
    """
    factor = other["all"]["norm_ratio"] / base["all"]["norm_ratio"]
    errors = [_relative_error(content) for content in (base, other)]
    interval, holds = "", None
    if None not in errors:
        groups = min(content["ladder"][-1]["num_groups"] for content in (base, other))
        half = t_quantile(groups - 1) * math.hypot(*(error for error in errors if error is not None))
        low, high = math.log(factor) - half, math.log(factor) + half
        most = math.log(TOLERANCE)
        holds = True if low >= -most and high <= most else False if low > most or high < -most else None
        interval = f" [{math.exp(low):.3f}, {math.exp(high):.3f}]"
    return Claim(
        what=f"r of {other['num_batches']:,} batches is that of {base['num_batches']:,} ({name}, step {other['step']:,})",
        paper="the outcome does not change",
        ours=f"r/√d {_text(base)} and {_text(other)}: a factor {factor:.3f}{interval}",
        tolerance=f"within a factor of {TOLERANCE:g}, with the {LEVEL:.0%} interval",
        holds=holds,
        is_resolved=holds is not None,
        convention=f"frozen parameters, batches of {other['global_batch_size']} samples of {other['seq_length']} tokens, no sample "
        f"twice in a probe; {_passes(base)} and {_passes(other)} passes over the training data; pure noise alone gives 0.798",
    )


def _relative_error(content: dict[str, Any]) -> float | None:
    error = content["ladder"][-1]["norm_ratio_standard_error"] if content["ladder"] else None
    return None if error is None else float(error) / float(content["all"]["norm_ratio"])


def _text(content: dict[str, Any]) -> str:
    """r/√d with its standard error, the share of noise, and the bounds without it."""
    root, noise = math.sqrt(content["all"]["num_parameters"]), content["noise"] or {}
    error = content["ladder"][-1]["norm_ratio_standard_error"] if content["ladder"] else None
    shown = f"{content['all']['norm_ratio'] / root:.4f}" + (f" ± {error / root:.4f}" if error is not None else "")
    inside = []
    if noise.get("noise_share") is not None:
        inside.append(f"noise share {noise['noise_share']:.0%}")
    if noise.get("norm_ratio_low") is not None:
        inside.append(f"without noise {noise['norm_ratio_low'] / root:.4f}–{noise['norm_ratio_high'] / root:.4f}")
    return shown + (f" ({', '.join(inside)})" if inside else "")


def _passes(content: dict[str, Any]) -> str:
    return f"{content['num_samples'] / content['population_samples']:.3f}"
