"""Claims on the rate constants c_LION and c_SGD, over runs that differ in their seed."""

from __future__ import annotations

import math

from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import JOURNAL, Claim
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.theory.rates import SeedRates, rates_over_seeds

SOURCE = f"{JOURNAL}, A.1.2"
# optimizer, norm, constant, the paper's value (ResNet18 on CIFAR-100, five runs averaged)
CONSTANTS = (("lion", "probe/grad_l1", "c_LION", 0.701), ("sgd", "probe/grad_l2", "c_SGD", 1.365))


def rate_claims(plan: Plan) -> list[Claim]:
    """c_LION and c_SGD of the runs, and whether the maximum over K is before the last K.

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
            rates = rates_over_seeds(
                [run.need(key).arrays() for run in runs], scale=1 / math.sqrt(d) if optimizer == "lion" else 1.0
            )
            found += _constant(name, paper, d, len(runs), rates)
    return found


def _constant(name: str, paper: float, d: int, runs: int, rates: SeedRates) -> list[Claim]:
    interval, best = rates.of_mean_interval, rates.of_mean
    ends = "" if math.isnan(interval.low) else f" [{interval.low:.3g}, {interval.high:.3g}]"
    convention = (
        f"d = {d:,}; largest over K ≤ {best.steps:,} steps, norms linear between probes; "
        f"{runs} seed{'s' * (runs > 1)}, bootstrap 95 %"
    )
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
            ours=f"at K = {best.at:,} of {best.steps:,}; at the last K {best.last:.3g}",
            tolerance="before the last K",
            holds=best.at < best.steps,
            convention=convention,
            source=SOURCE,
        ),
    ]
