"""Verdicts follow from evidence: enough checkpoints, probes and seeds, one text, and a gap that one seed can show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import write_run

from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import Claim
from megatron_lion.reproduce.claims import claims_of
from megatron_lion.reproduce.language_claims import ONE_SEED, ONE_SEED_MARGIN
from megatron_lion.reproduce.rate_claims import rate_claims
from megatron_lion.theory.rates import late_growth

D = 10_000
STEPS = np.arange(0, 161, 8)


def language_plan(tmp_path: Path, artefact: str = "table-b1", scale: Any = "tiny", **runs: Any) -> Plan:
    """LION and SGD at the paper's rates, written by `synthetic_runs.write_run`."""
    paper = {
        f"gpt2/{name}": write_run(tmp_path / name, optimizer=name, model="gpt2-demo", d=D, **runs)
        for name in ("lion", "sgd")
    }
    return Plan(artefact, scale, "gpt2", (), paper)


def claim(plan: Plan, start: str) -> Claim:
    return next(claim for claim in claims_of(plan) if claim.what.startswith(start))


def set_results(folder: Path, values: dict[int, float | None], **changes: Any) -> None:
    """Replaces the results of a run by the ln perplexities `values`, with other fields changed."""
    files = sorted((folder / "eval").iterdir())
    result = json.loads(files[0].read_text()) | changes
    for file in files:
        file.unlink()
    add_results(folder, values, result)


def add_results(folder: Path, values: dict[int, float | None], result: dict[str, Any], name: str = "") -> None:
    for step, value in values.items():
        content = json.dumps({**result, "step": step, "log_token_ppl": value})
        (folder / "eval" / f"{name}{step:05d}.json").write_text(content)


def set_checkpoints(plan: Plan, steps: list[int]) -> None:
    for folder in plan.paper_runs.values():
        with (folder / "config.yaml").open("a") as file:
            file.write(f"checkpoint:\n  at_steps: {steps}\n")


def both(plan: Plan, lion: dict[int, float | None], sgd: dict[int, float | None]) -> None:
    set_results(plan.paper_runs["gpt2/lion"], lion)
    set_results(plan.paper_runs["gpt2/sgd"], sgd)


@pytest.mark.parametrize(
    ("lion", "sgd", "planned", "verdict", "shown"),
    [
        ({1: 3.0, 2: 2.0}, {1: 4.0, 2: 3.5}, [1, 2], "holds", "1.000 1.500"),
        ({1: 3.0, 2: 2.0}, {1: 4.0, 2: 1.5}, [1, 2], "does not hold here", "1.000 -0.500"),
        ({1: 3.0, 2: 2.0}, {1: 4.0, 2: 2.05}, [1, 2], "not resolved", "1.000 0.050"),
        ({1: 3.0, 2: 2.0}, {1: 4.0, 2: 3.5}, [1, 2, 3], "not resolved", "1.000 1.500; 1 of 3 planned checkpoints missing"),
        ({1: 3.0, 2: 2.0}, {1: 4.0}, [], "not resolved", "1.000"),
        ({1: 3.0}, {1: 4.0}, [1], "not resolved", "1.000"),
        ({1: 3.0, 2: 2.0}, {1: 4.0, 2: 2.00001}, [1, 2], "not resolved", "1.00000 0.00001"),
        ({1: 3.0}, {2: 4.0}, [], "not comparable", "no checkpoint in common"),
    ],
)  # fmt: skip
def test_an_order_at_every_checkpoint_needs_every_checkpoint_and_a_clear_gap(
    tmp_path: Path, lion: Any, sgd: Any, planned: list[int], verdict: str, shown: str
) -> None:
    plan = language_plan(tmp_path)
    both(plan, lion, sgd)
    set_checkpoints(plan, planned)
    found = claim(plan, "LION below SGD")
    assert (found.verdict, found.ours) == (verdict, shown)
    if verdict != "not comparable":
        assert ONE_SEED in found.convention


@pytest.mark.parametrize(
    ("lion", "planned", "verdict"),
    [
        ({1: 3.0, 2: 2.999}, [1, 2], "holds"),
        ({1: 3.0, 2: 2.0}, [1, 2, 3], "not resolved"),
        ({1: 3.0, 2: 3.1}, [1, 2, 3], "does not hold here"),
        ({1: 3.0}, [], "not resolved"),
        ({1: 3.0, 2: None}, [], "not resolved"),
        ({1: math.nan}, [], "not comparable"),
    ],
)
def test_an_improvement_needs_two_checkpoints_and_all_planned_ones(
    tmp_path: Path, lion: Any, planned: list[int], verdict: str
) -> None:
    plan = language_plan(tmp_path)
    both(plan, lion, {1: 4.0, 2: 3.0})
    set_checkpoints(plan, planned)
    assert claim(plan, "LION improves").verdict == verdict


def test_a_number_of_the_table_without_our_result_is_not_comparable(tmp_path: Path) -> None:
    plan = language_plan(tmp_path, scale="full")
    both(plan, {10_000: 3.0}, {10_000: 9.0})
    assert claim(plan, "GPT-2 Small, LION, step 10,000").verdict == "does not hold here"
    missing = claim(plan, "GPT-2 Small, LION, step 20,000")
    assert (missing.verdict, missing.ours) == ("not comparable", "no result at this step")
    set_results(plan.paper_runs["gpt2/lion"], {10_000: 3.0}, kind="text")
    other = claim(plan, "GPT-2 Small, LION, step 10,000")
    assert (other.verdict, other.ours) == ("not comparable", "3.000; not on WikiText-103")


def test_lion_and_sgd_are_compared_on_one_text(tmp_path: Path) -> None:
    """One more result of SGD, on the whole text, replaces neither its values nor the stated convention."""
    plan = language_plan(tmp_path)
    lion, sgd = plan.paper_runs.values()
    for folder, shift in ((lion, 0.0), (sgd, 1.0)):
        set_results(folder, {1: 5.0 + shift, 2: 4.0 + shift}, max_tokens=30_000)
    whole = json.loads((sgd / "eval" / "00002.json").read_text()) | {"max_tokens": None}
    add_results(sgd, {2: 1.0}, whole, "whole")
    found = claim(plan, "LION below SGD")
    assert (found.verdict, found.ours) == ("holds", "1.000 1.000")
    assert "first 30,000 tokens" in found.convention
    add_results(lion, {2: 9.0}, whole, "whole")
    found = claim(plan, "LION below SGD")
    assert (found.verdict, found.ours) == ("holds", "1.000 1.000"), "the plan's own evaluation has more checkpoints"
    assert "first 30,000 tokens" in found.convention
    set_results(sgd, {1: 6.0, 2: 5.0}, text_sha256="other")
    assert claim(plan, "LION below SGD").verdict == "not comparable"
    assert claim(plan, "SGD improves").verdict == "holds"


def set_losses(folder: Path, key: str, values: dict[int, float | None]) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name != key} for line in lines]
    kept += [{"step": step, key: value} for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.mark.parametrize(
    ("sgd", "verdict", "shown"),
    [
        ({9: 3.0 + 2 * ONE_SEED_MARGIN}, "holds", "LION 3.0000, SGD 3.1600"),
        ({9: 3.0 - 2 * ONE_SEED_MARGIN}, "does not hold here", "SGD 2.8400, LION 3.0000"),
        ({9: 3.00001}, "not resolved", "LION 3.00000, SGD 3.00001"),
        ({9: None}, "not comparable", "LION 3.0000; SGD has no value"),
        ({3: 4.0}, "not comparable", "LION 3.0000, SGD 4.0000; measured at step 9 (LION), step 3 (SGD)"),
    ],
)
def test_an_order_of_losses_needs_two_values_at_one_step_and_a_clear_gap(
    tmp_path: Path, sgd: Any, verdict: str, shown: str
) -> None:
    """The rule is the same at the paper's rates and at tuned ones."""
    plan = language_plan(tmp_path, "figure-3")
    for key, statement in (("test/loss", "test loss of LION"), ("train/loss", "training loss of LION")):
        set_losses(plan.paper_runs["gpt2/lion"], key, {9: 3.0})
        set_losses(plan.paper_runs["gpt2/sgd"], key, sgd)
        found = claim(plan, statement)
        assert (found.verdict, found.ours) == (verdict, shown)
        assert ONE_SEED in found.convention
    tuned = Plan("figure-3", "tiny", "gpt2", (), plan.paper_runs, plan.paper_runs)
    found = claim(tuned, "tuned LION below tuned SGD")
    assert (found.verdict, found.ours, found.convention) == (verdict, shown, ONE_SEED)


def test_one_probe_does_not_show_that_a_ratio_is_constant(tmp_path: Path) -> None:
    plan = language_plan(tmp_path, "figure-3", probes=False)
    names = ("low", "high", "low_standard_error", "high_standard_error")
    values = zip(names, (30.0, 35.0, 0.1, 0.1), strict=True)
    probe = {f"probe/norm_ratio_{name}": value for name, value in values}
    probe |= {"probe/norm_ratio_over_sqrt_d": 0.33, "probe/noise_groups": 32, "probe/sqrt_d": 100.0}
    for steps, verdict in (([0], "not resolved"), ([0, 50], "holds")):
        for folder in plan.paper_runs.values():
            with (folder / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps({"step": step, **probe}) + "\n" for step in steps)
        assert claim(plan, "r/√d stays constant").verdict == verdict


def rate_verdicts(tmp_path: Path, curves: Sequence[Any], steps: Sequence[int]) -> list[str]:
    """The verdicts on the rate of LION and of SGD for runs with these norms."""
    seeds: dict[str, list[Path]] = {"lion": [], "sgd": []}
    for optimizer, folders in seeds.items():
        for seed, norms in enumerate(curves):
            folder = write_run(tmp_path / f"{optimizer}{seed}", optimizer=optimizer, seed=seed, d=D, probes=False)
            folders.append(folder)
            with (folder / "metrics.jsonl").open("a") as file:
                for step, norm in zip(steps, norms, strict=True):
                    line = {"step": int(step), "probe/grad_l1": norm * math.sqrt(D), "probe/grad_l2": norm}
                    file.write(json.dumps(line) + "\n")
    found = rate_claims(Plan("rates", "tiny", "gpt2", (), seeds=seeds))
    return [claim.verdict for claim in found if "rate is kept" in claim.what]


@pytest.mark.parametrize(
    ("power", "wave", "seeds", "verdict"),
    [
        (0.5, 0.0, 3, "holds"),
        (0.0, 0.0, 3, "does not hold here"),
        (0.5, 0.0, 1, "not resolved"),
        (0.25, 0.3, 3, "not resolved"),
    ],
)
def test_the_rate_is_judged_by_the_end_of_the_curve_with_its_error(
    tmp_path: Path, power: float, wave: float, seeds: int, verdict: str
) -> None:
    rng = np.random.default_rng(0)
    noise = np.exp((0.02 + wave) * rng.standard_normal((seeds, len(STEPS))))
    assert rate_verdicts(tmp_path, ((STEPS + 1.0) ** -power * noise).tolist(), STEPS.tolist()) == [verdict] * 2


def test_a_zero_at_the_end_or_a_single_probe_does_not_decide_the_rate(tmp_path: Path) -> None:
    """The curve of a constant norm grows; one last norm of 0 puts its maximum before the last K."""
    cut = [[1.0] * 20 + [0.0]] * 2 + [[1.0] * 21]
    assert rate_verdicts(tmp_path / "cut", cut, STEPS.tolist())[0] == "does not hold here"
    assert rate_verdicts(tmp_path / "one", [[1.0], [1.1], [0.9]], [0]) == ["not resolved"] * 2
    early = [[9.0 + seed / 10, *[1e-9] * 9, *[0.5] * 11] for seed in range(3)]
    assert rate_verdicts(tmp_path / "early", early, STEPS.tolist()) == ["not resolved"] * 2, (
        "grows, but below its maximum"
    )


@pytest.mark.parametrize(("power", "scatter"), [(0.0, 0.3), (0.2, 0.1), (0.2, 0.3)])
def test_the_interval_of_the_growth_rarely_excludes_the_truth(power: float, scatter: float) -> None:
    """Three seeds whose norms fall more slowly than k^(−1/4), so that 'holds' would be wrong; at most 5 % may be."""
    rng, runs = np.random.default_rng(0), 100
    wrong = 0
    for _ in range(runs):
        norms = (STEPS + 1.0) ** -power * np.exp(scatter * rng.standard_normal((3, len(STEPS))))
        wrong += late_growth([(STEPS, row) for row in norms]).high < 0
    assert wrong / runs <= 0.05
