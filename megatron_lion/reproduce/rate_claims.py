"""Claims on the rate constants c_LION and c_SGD, over runs that differ in their seed."""

from __future__ import annotations

import math

from megatron_lion.intervals import Interval
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import JOURNAL, Claim
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.theory.probe_noise import l2_norms
from megatron_lion.theory.rates import SeedRates, late_growth, rates_over_seeds

SOURCE = f"{JOURNAL}, A.1.2"
# optimizer, norm, constant, the paper's value (ResNet18 on CIFAR-100, five runs averaged)
CONSTANTS = (("lion", "probe/grad_l1", "c_LION", 0.701), ("sgd", "probe/grad_l2", "c_SGD", 1.365))


def rate_claims(plan: Plan) -> list[Claim]:
    """c_LION and c_SGD of the runs, and whether the curve of each falls at the end, so that its maximum is before the last K.

    Raises:
        CheckpointError: a run is missing, or has no probes.
    """
    found: list[Claim] = []
    for optimizer, key, name, paper in CONSTANTS:
        by_d: dict[int, list[RunRecord]] = {}
        for folder in plan.seeds[optimizer]:
            run = read_run(folder)
            by_d.setdefault(run.dimension, []).append(run)
        for d, runs in by_d.items():
            if optimizer == "lion":
                curves = [run.need(key).arrays() for run in runs]
                norm = "‖ḡ‖₁, an upper value"
            else:
                corrected = [l2_norms(run) for run in runs]
                curves = [(steps, norms) for steps, norms, _ in corrected]
                probes = sum(len(steps) for steps, _ in curves)
                norm = f"‖∇f‖₂ without noise at {sum(count for *_, count in corrected)} of {probes} probes"
            rates = rates_over_seeds(curves, scale=1 / math.sqrt(d) if optimizer == "lion" else 1.0)
            found += _constant(name, paper, d, norm, rates, late_growth(curves), len(runs))
    return found


def _constant(name: str, paper: float, d: int, norm: str, rates: SeedRates, growth: Interval, runs: int) -> list[Claim]:
    interval, best = rates.of_mean_interval, rates.of_mean
    ends = "" if interval.low is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
    convention = f"d = {d:,}; {norm}; largest over K ≤ {best.steps:,} steps, norms linear between probes; " + (
        "one seed, no interval" if runs == 1 else f"{runs} seeds, jackknife {interval.confidence:.0%} interval"
    )
    holds = _falls_at_the_end(growth, rises=best.at > best.steps / 2)
    return [
        Claim(
            what=f"{name} (theirs: ResNet18 on CIFAR-100, 5 runs)",
            paper=f"{paper}",
            ours=f"{best.value:.3g}{ends}",
            convention=convention,
            source=SOURCE,
        ),
        Claim(
            what=f"the K^(−1/4) rate is kept with {name}: the maximum is not at the last K",
            paper="yes",
            ours=f"at K = {best.at:,} of {best.steps:,}; at the last K {best.last:.3g}; {_late(growth)}",
            tolerance="falls over the last half of the K, with the interval below 1",
            holds=holds,
            is_resolved=holds is not None,
            convention=convention,
            source=SOURCE,
        ),
    ]


def _falls_at_the_end(growth: Interval, *, rises: bool) -> bool | None:
    """Whether the maximum is not at the last K; None if the interval of the growth includes 0 or is not known.

    A curve that grows over the last half of the steps refutes the statement only if its maximum is there (`rises`).
    """
    if growth.low is None or growth.high is None:
        return None
    return True if growth.high < 0 else False if growth.low > 0 and rises else None


def _late(growth: Interval) -> str:
    if growth.low is None or growth.high is None:
        return "no interval of its growth (needs several seeds, and probes at two steps)"
    factors = [math.exp(value) for value in (growth.estimate, growth.low, growth.high)]
    return "over the last half of the K by a factor {:.3g} [{:.3g}, {:.3g}]".format(*factors)
