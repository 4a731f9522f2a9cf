"""Claims of Table B.1 and Figures 2 and 3: perplexities, losses and norm ratios of LION and SGD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from megatron_lion.compare.selection import evaluation_key, main_evaluation_key
from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.published_results import TABLE_B1
from megatron_lion.intervals import LEVEL, t_quantile
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import NOT_THEIRS, Claim, joined
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord, read_run

TABLE_TOLERANCE = 0.10
"""Nats; our choice: the paper states neither weight decay, schedule, warm-up nor the split of the text."""
RATIO_BAND = 2.0
"""Largest ratio of a run's maximal to its minimal noise-free r/√d that counts as constant; our choice, the paper shows
curves."""
LAST_LINES = 10
_PAPER_NAMES = {"gpt2-small": "GPT-2 Small", "gpt2-medium": "GPT-2 Medium", "gpt2": "GPT-2 Small"}


def _groups(plan: Plan) -> Iterator[tuple[str, RunRecord, RunRecord, list[RunRecord]]]:
    """(model, LION, SGD, tuned runs) of each model; LION and SGD are at the paper's rates."""
    for model in dict.fromkeys(name.split("/")[0] for name in plan.paper_runs):
        lion, sgd = (read_run(plan.paper_runs[f"{model}/{optimizer}"]) for optimizer in ("lion", "sgd"))
        tuned = [read_run(folder) for name, folder in plan.tuned_runs.items() if name.startswith(model + "/")]
        yield model, lion, sgd, tuned


def perplexity_claims(plan: Plan) -> list[Claim]:
    """Table B.1: the numbers if the model is the paper's, else the order; then tuned runs, which the paper lacks."""
    found: list[Claim] = []
    for model, lion, sgd, tuned in _groups(plan):
        name, convention = _PAPER_NAMES[model], _convention(lion)
        ours = {"LION": log_perplexities(lion), "SGD": log_perplexities(sgd)}
        for optimizer, values in ours.items():
            found += _table_rows(plan.scale == "full", name, optimizer, values, convention)
        found += _order_at_checkpoints(name, ours, convention)
        for optimizer, values in ours.items():
            found.append(_improves(optimizer, values, convention))
        found += [
            Claim(
                what=f"{_name(run)} at a tuned rate ({_rate(run)})",
                paper=NOT_THEIRS,
                ours=joined(value for _, value in log_perplexities(run)),
                convention=convention,
                source="–",
            )
            for run in tuned
        ]
        last = [log_perplexities(run)[-1][1] for run in tuned]
        found += _tuned_order(tuned, last, "log perplexity at the last checkpoint")
    return found


def _table_rows(
    is_full: bool, name: str, optimizer: str, values: Sequence[tuple[int, float]], convention: str
) -> Iterator[Claim]:
    published = TABLE_B1[name, optimizer]
    if not is_full:
        yield Claim(
            what=f"{optimizer}: ln perplexity at the checkpoints (theirs: {name}, 33 B tokens)",
            paper=joined(published),
            ours=joined(value for _, value in values),
            convention=convention,
        )
        return
    by_step = dict(values)
    for place, value in enumerate(published, 1):
        step = 10_000 * place
        here = by_step.get(step)
        yield Claim(
            what=f"{name}, {optimizer}, step {step:,}: ln perplexity",
            paper=f"{value}",
            ours="no checkpoint" if here is None else f"{here:.3f}",
            tolerance=f"± {TABLE_TOLERANCE}",
            holds=here is not None and abs(here - value) <= TABLE_TOLERANCE,
            convention=convention,
        )


def _order_at_checkpoints(name: str, ours: dict[str, list[tuple[int, float]]], convention: str) -> Iterator[Claim]:
    shared = sorted(dict(ours["LION"]).keys() & dict(ours["SGD"]).keys())
    gaps = [dict(ours["SGD"])[step] - dict(ours["LION"])[step] for step in shared]
    theirs = [s - li for li, s in zip(TABLE_B1[name, "LION"], TABLE_B1[name, "SGD"], strict=True)]
    yield Claim(
        what="LION below SGD at every checkpoint, both at the paper's rates (SGD − LION, nats)",
        paper=joined(theirs),
        ours=joined(gaps),
        tolerance="> 0 at each",
        holds=bool(gaps) and min(gaps) > 0,
        convention=convention,
    )


def _improves(optimizer: str, values: Sequence[tuple[int, float]], convention: str) -> Claim:
    losses = [value for _, value in values]
    return Claim(
        what=f"{optimizer} improves from each checkpoint to the next",
        paper="yes",
        ours=joined(losses),
        tolerance="falls each time",
        holds=all(later < earlier for earlier, later in itertools.pairwise(losses)),
        convention=convention,
    )


def curve_claims(plan: Plan) -> list[Claim]:
    """Figures 2 and 3: the order of the losses, and the variation of r/√d."""
    found: list[Claim] = []
    for _, lion, sgd, tuned in _groups(plan):
        for key, name, convention in (
            ("train/loss", "training loss", f"mean of the last {LAST_LINES} logged steps, nats"),
            ("test/loss", "test loss", "last measurement on the test split, dropout off, nats"),
        ):
            lion_loss, sgd_loss = last_loss(lion, key), last_loss(sgd, key)
            found.append(
                Claim(
                    what=f"{name} of LION below SGD's, both at the paper's rates",
                    paper="yes (curves)",
                    ours=f"LION {lion_loss:.4f}, SGD {sgd_loss:.4f}",
                    tolerance="below",
                    holds=lion_loss < sgd_loss,
                    convention=convention,
                )
            )
        found += [_ratio(run, "paper's") for run in (lion, sgd)]
        found += [_ratio(run, "tuned") for run in tuned]
        found += _tuned_order(tuned, [last_loss(run, "test/loss") for run in tuned], "test loss")
    return found


def _ratio(run: RunRecord, which: str) -> Claim:
    """r/√d of the noise-free gradient over a run's probes, which is constant if r = Θ(√d).

    It is judged by the bounds that each probe gives with their errors, not by the measured r, whose noise alone would give
    0.798: it holds if no values inside the bounds differ by more than `RATIO_BAND`, and does not hold if all do.

    Raises:
        CheckpointError: the run has no probes.
    """
    measured = run.series("probe/norm_ratio_over_sqrt_d")
    if not measured.values:
        raise CheckpointError(f"{run.folder}: has no probes; give the same command again to make them")
    bounds = [ratio_interval(run, step, len(measured.steps)) for step in measured.steps]
    known = [ends for ends in bounds if ends is not None]
    most = max(high for _, high in known) / min(low for low, _ in known) if len(known) == len(bounds) else math.inf
    least = max(low for low, _ in known) / min(high for _, high in known) if known else 0.0
    holds = True if most <= RATIO_BAND else False if least > RATIO_BAND else None
    noise = run.series("probe/noise_share").values
    share = f"; noise share {min(noise):.0%}–{max(noise):.0%}" if noise else ""
    values = measured.values
    ours = f"measured {min(values):.3f}–{max(values):.3f}{share}"
    if known:
        clean = f"{min(low for low, _ in known):.3f}–{max(high for _, high in known):.3f}"
        ours += f"; without noise inside {clean} at {len(known)} of {len(bounds)} probes"
        if len(known) == len(bounds):
            ours += f", a factor between {max(1.0, least):.2f} and {most:.2f}"
    batches = int(run.series("probe/num_batches").last or 0)
    return Claim(
        what=f"r/√d stays constant while {_name(run)} trains ({which} rate {_rate(run)})",
        paper="r = Θ(√d) throughout (curves)",
        ours=ours,
        tolerance=f"a factor of at most {RATIO_BAND:g}, noise removed",
        holds=holds,
        is_resolved=holds is not None,
        convention=f"{len(values)} probes of {batches} batches at frozen parameters; d = {run.num_parameters:,} with "
        f"padding; bounds that hold together with {LEVEL:.0%}; pure noise alone gives 0.798",
    )


def ratio_interval(run: RunRecord, step: int, probes: int) -> tuple[float, float] | None:
    """Returns an interval that contains the noise-free r/√d at a step, or None if the probe does not resolve it.

    Args:
        run: records with probe/norm_ratio_low, probe/norm_ratio_high, their standard errors and probe/noise_groups.
        step: step of a probe.
        probes: number of probes whose intervals must hold together (Bonferroni).
    """
    names = ("norm_ratio_low", "norm_ratio_low_standard_error", "norm_ratio_high", "norm_ratio_high_standard_error")
    found = [_at(run, f"probe/{name}", step) for name in (*names, "noise_groups", "sqrt_d")]
    if any(value is None for value in found):
        return None
    low, low_error, high, high_error, groups, root = (float(value) for value in found if value is not None)
    quantile = t_quantile(groups - 1, 1 - (1 - LEVEL) / probes)
    least, most = max(low - quantile * low_error, 1.0), min(high + quantile * high_error, root)
    return least / root, most / root


def _at(run: RunRecord, key: str, step: int) -> float | None:
    series = run.series(key)
    return dict(zip(series.steps, series.values, strict=True)).get(step)


def _tuned_order(tuned: Sequence[RunRecord], values: Sequence[float], what: str) -> list[Claim]:
    """The order of LION and SGD if both are tuned, which the paper does not state."""
    by_optimizer = {run.optimizer: value for run, value in zip(tuned, values, strict=True)}
    if not {"lion", "sgd"} <= by_optimizer.keys():
        return []
    ranked = sorted(by_optimizer.items(), key=lambda item: item[1])
    return [
        Claim(
            what=f"tuned LION below tuned SGD: {what}",
            paper="SGD was not tuned",
            ours=", ".join(f"{OPTIMIZER_NAMES.get(name, name)} {value:.4f}" for name, value in ranked),
            tolerance="below",
            is_resolved=False,
            convention="one seed each: how much of the gap is luck is not known",
            source="–",
        )
    ]


def log_perplexities(run: RunRecord) -> list[tuple[int, float]]:
    """(step, ln token perplexity) under the first convention with which a run was evaluated.

    Raises:
        CheckpointError: the run was not evaluated.
    """
    key = main_evaluation_key([run])
    found = {int(r["step"]): float(r["log_token_ppl"]) for r in run.evaluations if evaluation_key(r) == key}
    if not found:
        raise CheckpointError(f"{run.folder}: was not evaluated; give the same command again to evaluate it")
    return sorted(found.items())


def last_loss(run: RunRecord, key: str) -> float:
    """Mean training loss of the last logged steps, or the last held-out loss (nats)."""
    values = run.series(key).values[-LAST_LINES:] if key == "train/loss" else run.series(key).values[-1:]
    return sum(values) / len(values) if values else math.nan


def _convention(run: RunRecord) -> str:
    result = run.evaluations[-1] if run.evaluations else {}
    version = result.get("text_version", "unknown")
    text = str(result.get("text_path", "")).rpartition("/")[2] if version == "unknown" else version
    first = f", first {result['max_tokens']:,} tokens" if result.get("max_tokens") else ""
    return f"{text}, windows of {result.get('seq_length')}, stride {result.get('stride')}{first}, per token"


def _rate(run: RunRecord) -> str:
    return f"{run.settings.get('optimizer.lr'):g}"


def _name(run: RunRecord) -> str:
    return OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)
