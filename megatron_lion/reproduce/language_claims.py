"""Claims of Table B.1 and Figures 2 and 3: perplexities, losses and norm ratios of LION and SGD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from megatron_lion.compare.selection import evaluation_key, evaluation_keys, main_evaluation_key
from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.published_results import TABLE_B1
from megatron_lion.intervals import LEVEL, t_quantile
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import ARXIV, NOT_THEIRS, Claim, decimals_for, joined
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord, read_run

TABLE_TOLERANCE = 0.10
"""Nats; our choice: the paper states neither weight decay, schedule, warm-up nor the split of the text."""
RATIO_BAND = 2.0
"""Largest ratio of a run's maximal to its minimal noise-free r/√d that counts as constant; our choice, the paper shows
curves."""
ONE_SEED_MARGIN = 0.08
"""Nats. With one seed each, an order is judged only if its gap is larger: two runs of one setting differed by as much
(benchmarks/results/rates_demo.md)."""
ONE_SEED = f"one seed each: a gap of at most {ONE_SEED_MARGIN:g} nats decides nothing, since runs of one setting differed by up to that"
ONE_RUN = "a statement about this one run"
LEAST_POINTS = 2
"""Smallest number of checkpoints or probes for a statement about all of them; one has nothing to differ from."""
LAST_LINES = 10
PAPER_STEPS = tuple(range(10_000, 50_001, 10_000))
NO_SHARED_TEXT = "no text and convention under which both LION and SGD were evaluated"
_PAPER_NAMES = {"gpt2-small": "GPT-2 Small", "gpt2-medium": "GPT-2 Medium", "gpt2": "GPT-2 Small"}


def _groups(plan: Plan) -> Iterator[tuple[str, RunRecord, RunRecord, list[RunRecord]]]:
    """(model, LION, SGD, tuned runs) of each model; LION and SGD are at the paper's rates."""
    for model in dict.fromkeys(name.split("/")[0] for name in plan.paper_runs):
        lion, sgd = (read_run(plan.paper_runs[f"{model}/{optimizer}"]) for optimizer in ("lion", "sgd"))
        tuned = [read_run(folder) for name, folder in plan.tuned_runs.items() if name.startswith(model + "/")]
        yield model, lion, sgd, tuned


def perplexity_claims(plan: Plan) -> list[Claim]:
    """Table B.1: the numbers if the model is the paper's, else the order; then tuned runs, which the paper lacks.

    Raises:
        CheckpointError: a run was not evaluated.
    """
    found: list[Claim] = []
    for model, lion, sgd, tuned in _groups(plan):
        name, is_full = _PAPER_NAMES[model], plan.scale == "full"
        keys = [_own_key(run) for run in (lion, sgd, *tuned)]
        shared = shared_evaluation_key(lion, sgd, tuned)
        planned = PAPER_STEPS if is_full else _planned_steps(lion, sgd)
        # Without a shared convention, each run's own one still gives the statements that concern one run only.
        own = {"LION": (lion, shared or keys[0]), "SGD": (sgd, shared or keys[1])}
        ours = {optimizer: log_perplexities(run, key) for optimizer, (run, key) in own.items()}
        conventions = {optimizer: _convention(run, key) for optimizer, (run, key) in own.items()}
        for optimizer, values in ours.items():
            on_wikitext = own[optimizer][1][0] == "wikitext103"
            found += _table_rows(is_full, name, optimizer, values, conventions[optimizer], on_wikitext)
        convention = f"{conventions['LION']}; {ONE_SEED}" if shared else NO_SHARED_TEXT
        found += _order_at_checkpoints(name, ours if shared else {"LION": [], "SGD": []}, convention, planned)
        for optimizer, values in ours.items():
            found.append(_improves(optimizer, values, f"{conventions[optimizer]}; {ONE_RUN}", planned))
        measured = [log_perplexities(run, shared) if shared else [] for run in tuned]
        found += [
            Claim(
                what=f"{_name(run)} at a tuned rate ({_rate(run)})",
                paper=NOT_THEIRS,
                ours=joined(value for _, value in values) or "no result",
                convention=conventions["LION"] if values else NO_SHARED_TEXT,
                source="–",
            )
            for run, values in zip(tuned, measured, strict=True)
        ]
        last = [values[-1] if values else None for values in measured]
        found += _tuned_order(tuned, last, "log perplexity at the last checkpoint")
    return found


def _own_key(run: RunRecord) -> tuple[Any, ...]:
    key = main_evaluation_key([run])
    if key is None:
        raise CheckpointError(f"{run.folder}: was not evaluated; give the same command again to evaluate it")
    return key


def _planned_steps(*runs: RunRecord) -> set[int]:
    """Steps of the checkpoints that the runs were set to save; empty if their config.yaml has none."""
    listed = [run.settings.get("checkpoint.at_steps") for run in runs]
    return {int(step) for steps in listed if isinstance(steps, list) for step in steps if isinstance(step, int)}


def _table_rows(
    is_full: bool,
    name: str,
    optimizer: str,
    values: Sequence[tuple[int, float]],
    convention: str,
    on_wikitext: bool = True,
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
    for step, value in zip(PAPER_STEPS, published, strict=True):
        here = by_step.get(step)
        reason = "no result at this step" if here is None else "" if on_wikitext else "; not on WikiText-103"
        yield Claim(
            what=f"{name}, {optimizer}, step {step:,}: ln perplexity",
            paper=f"{value}",
            ours=reason if here is None else f"{here:.3f}{reason}",
            tolerance=f"± {TABLE_TOLERANCE}",
            holds=None if here is None or reason else abs(here - value) <= TABLE_TOLERANCE,
            convention=convention,
        )


def _order_at_checkpoints(
    name: str, ours: dict[str, list[tuple[int, float]]], convention: str, planned: Collection[int] = ()
) -> Iterator[Claim]:
    """The order at all `planned` steps; without any, at all steps at which one of the two was evaluated."""
    lion, sgd = dict(ours["LION"]), dict(ours["SGD"])
    shared = sorted(lion.keys() & sgd.keys())
    gaps = [sgd[step] - lion[step] for step in shared]
    holds = _order(gaps)
    if holds and not _is_complete(shared, planned or lion.keys() | sgd.keys()):
        holds = None
    theirs = [s - li for li, s in zip(TABLE_B1[name, "LION"], TABLE_B1[name, "SGD"], strict=True)]
    yield Claim(
        what="LION below SGD at every checkpoint, both at the paper's rates (SGD − LION, nats)",
        paper=joined(theirs),
        ours=joined(gaps, decimals_for(gaps)) + _missing(shared, planned) if gaps else "no checkpoint in common",
        tolerance=f"> {ONE_SEED_MARGIN:g} at each",
        holds=holds,
        is_resolved=holds is not None or not gaps,
        convention=convention,
    )


def _improves(
    optimizer: str, values: Sequence[tuple[int, float]], convention: str, planned: Collection[int] = ()
) -> Claim:
    steps, losses = [step for step, _ in values], [value for _, value in values]
    falls = [earlier - later for earlier, later in itertools.pairwise(losses)]
    holds = False if any(fall <= 0 for fall in falls) else True if _is_complete(steps, planned) else None
    return Claim(
        what=f"{optimizer} improves from each checkpoint to the next",
        paper="yes",
        ours=joined(losses, decimals_for(falls)) + _missing(steps, planned)
        if losses
        else "no checkpoint with a finite value",
        tolerance="falls each time",
        holds=holds,
        is_resolved=holds is not None or not losses,
        convention=convention,
    )


def _is_complete(steps: Collection[int], planned: Collection[int]) -> bool:
    """Whether a statement about every checkpoint may rest on `steps`."""
    return len(steps) >= LEAST_POINTS and set(planned) <= set(steps)


def _missing(steps: Collection[int], planned: Collection[int]) -> str:
    """States how many planned steps have no value; empty if none."""
    count = len(set(planned) - set(steps))
    return f"; {count} of {len(set(planned))} planned checkpoints missing" if count else ""


def _order(gaps: Sequence[float]) -> bool | None:
    """Whether all gaps are positive; None if one is within `ONE_SEED_MARGIN` and none is clearly negative."""
    if any(gap < -ONE_SEED_MARGIN for gap in gaps):
        return False
    return True if gaps and min(gaps) > ONE_SEED_MARGIN else None


def curve_claims(plan: Plan) -> list[Claim]:
    """Figures 2 and 3: the order of the losses, and the variation of r/√d."""
    found: list[Claim] = []
    for _, lion, sgd, tuned in _groups(plan):
        for key, name, convention in (
            ("train/loss", "training loss", f"mean of the last {LAST_LINES} logged steps, nats"),
            ("test/loss", "test loss", "last measurement on the test split, dropout off, nats"),
        ):
            found.append(
                _order_claim(
                    {"LION": last_loss(lion, key), "SGD": last_loss(sgd, key)},
                    what=f"{name} of LION below SGD's, both at the paper's rates",
                    paper="yes (curves)",
                    convention=f"{convention}; {ONE_SEED}",
                )
            )
        found += [_ratio(run, "paper's") for run in (lion, sgd)]
        found += [_ratio(run, "tuned") for run in tuned]
        found += _tuned_order(tuned, [last_loss(run, "test/loss") for run in tuned], "test loss")
    return found


def _order_claim(
    measured: dict[str, tuple[int, float] | None], *, what: str, paper: str, convention: str, source: str = ARXIV
) -> Claim:
    """LION below SGD, from the (step, value) of each; not comparable if one has no value or the steps differ."""
    values = {name: found[1] for name, found in measured.items() if found is not None}
    gap = values["SGD"] - values["LION"] if {"LION", "SGD"} <= values.keys() else math.nan
    decimals = decimals_for([gap] if math.isfinite(gap) else [], least=4)
    ours = ", ".join(
        f"{name} {format(value, decimals)}" for name, value in sorted(values.items(), key=lambda item: item[1])
    )
    reasons = [f"{name} has no value" for name, found in measured.items() if found is None]
    steps = {name: found[0] for name, found in measured.items() if found is not None and name in ("LION", "SGD")}
    if len(set(steps.values())) > 1:
        reasons.append("measured at " + ", ".join(f"step {step} ({name})" for name, step in steps.items()))
    comparable = math.isfinite(gap) and len(set(steps.values())) == 1
    holds = _order([gap]) if comparable else None
    return Claim(
        what=what,
        paper=paper,
        ours="; ".join([*([ours] if ours else []), *reasons]),
        tolerance=f"below by > {ONE_SEED_MARGIN:g}",
        holds=holds,
        is_resolved=holds is not None or not comparable,
        convention=convention,
        source=source,
    )


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
    if len(bounds) < LEAST_POINTS:  # a ratio measured once is not known to stay constant
        holds = None
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
        f"padding; bounds that hold together with {LEVEL:.0%}; even Gaussian noise alone gives 0.798",
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


def _tuned_order(tuned: Sequence[RunRecord], measured: Sequence[tuple[int, float] | None], what: str) -> list[Claim]:
    """The order of LION and SGD if both are tuned, which the paper does not state."""
    if not {"lion", "sgd"} <= {run.optimizer for run in tuned}:
        return []
    return [
        _order_claim(
            {_name(run): found for run, found in zip(tuned, measured, strict=True)},
            what=f"tuned LION below tuned SGD: {what}",
            paper="SGD was not tuned",
            convention=ONE_SEED,
            source="–",
        )
    ]


def shared_evaluation_key(lion: RunRecord, sgd: RunRecord, others: Sequence[RunRecord] = ()) -> tuple[Any, ...] | None:
    """The convention that both LION and SGD were evaluated under, or None.

    If there are several, it is the one of most runs, then the one with most checkpoints that LION and SGD share, then the
    first of `evaluation_keys`. An additional evaluation of single checkpoints thus never replaces that of the plan.
    """

    def rank(key: tuple[Any, ...]) -> tuple[int, int]:
        steps = [{step for step, _ in log_perplexities(run, key)} for run in (lion, sgd, *others)]
        return sum(map(bool, steps)), len(steps[0] & steps[1])

    both = [
        key
        for key in evaluation_keys([lion, sgd, *others])
        if log_perplexities(lion, key) and log_perplexities(sgd, key)
    ]
    return max(both, key=rank, default=None)


def log_perplexities(run: RunRecord, key: tuple[Any, ...] | None) -> list[tuple[int, float]]:
    """(step, ln token perplexity) under the convention of an evaluation key, ascending; finite values only."""
    found = {int(r["step"]): r.get("log_token_ppl") for r in run.evaluations if evaluation_key(r) == key}
    return sorted((step, float(value)) for step, value in found.items() if value is not None and math.isfinite(value))


def last_loss(run: RunRecord, key: str) -> tuple[int, float] | None:
    """(last step, loss in nats) of the mean training loss of the last logged steps, or of the last held-out loss."""
    series = run.series(key)
    values = series.values[-LAST_LINES:] if key == "train/loss" else series.values[-1:]
    return (series.steps[-1], sum(values) / len(values)) if values else None


def _convention(run: RunRecord, key: tuple[Any, ...] | None) -> str:
    results = [result for result in run.evaluations if evaluation_key(result) == key]
    result = results[-1] if results else {}
    version = result.get("text_version", "unknown")
    text = str(result.get("text_path", "")).rpartition("/")[2] if version == "unknown" else version
    first = f", first {result['max_tokens']:,} tokens" if result.get("max_tokens") else ""
    return f"{text}, windows of {result.get('seq_length')}, stride {result.get('stride')}{first}, per token"


def _rate(run: RunRecord) -> str:
    return f"{run.settings.get('optimizer.lr'):g}"


def _name(run: RunRecord) -> str:
    return OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)
