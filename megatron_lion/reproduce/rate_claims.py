"""Claims on the rate constants c_LION and c_SGD, over runs that differ in their seed."""

from __future__ import annotations

import math

from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import JOURNAL, Claim
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.theory.probe_noise import l2_norms
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
            if optimizer == "lion":
                curves = [run.need(key).arrays() for run in runs]
                norm = "‖ḡ‖₁, an upper value"
            else:
                corrected = [l2_norms(run) for run in runs]
                curves = [(steps, norms) for steps, norms, _ in corrected]
                probes = sum(len(steps) for steps, _ in curves)
                norm = f"‖∇f‖₂ without noise at {sum(count for *_, count in corrected)} of {probes} probes"
            rates = rates_over_seeds(curves, scale=1 / math.sqrt(d) if optimizer == "lion" else 1.0)
            found += _constant(name, paper, d, norm, rates, len(runs))
    return found


def _constant(name: str, paper: float, d: int, norm: str, rates: SeedRates, runs: int) -> list[Claim]:
    interval, best = rates.of_mean_interval, rates.of_mean
    ends = "" if interval.low is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
    convention = f"d = {d:,}; {norm}; largest over K ≤ {best.steps:,} steps, norms linear between probes; " + (
        "one seed, no interval" if runs == 1 else f"{runs} seeds, jackknife {interval.confidence:.0%} interval"
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
