"""L from the change of the gradient along a run's steps: used if it is larger and usable, and damaged results are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from test_run_theory import L, call, write_run

from megatron_lion.commands import theory as theory_verb
from megatron_lion.errors import DataError
from megatron_lion.gradient.smoothness_figure import draw_smoothness
from megatron_lion.intervals import t_quantile
from megatron_lion.runs.record import read_run
from megatron_lion.theory import estimate
from megatron_lion.theory.estimate import estimate_smoothness, measured_smoothness


def write_result(folder, step, value, **changes):
    all_part = {
        "smoothness_l2": value, "smoothness_l2_standard_error": 0.1, "is_resolved": True, "num_groups": 9,
        "num_parameters": 400, "change_l1": 1.5, "step_linf": 0.01, "step_l2": 0.2, "change_l1_low": 1.0, "change_l1_high": 1.5,
        "change_l2_corrected": 0.2 * (value or 0), "noise_share": 0.1, "smoothness_linf_low": 100.0, "smoothness_linf_high": 150.0,
        **changes.pop("all", {}),
    }  # fmt: skip
    content = {
        "format": 1, "step": step, "num_steps": 1, "num_batches": 32, "data": "fixed", "precision": "fp32", "optimizer": "lion",
        "skipped_steps": 0, "num_blocks": 6,
        "loss_change": -0.01, "first_order_change": -0.02, "curvature": 0.02, "curvature_standard_error": 0.001,
        "all": all_part, **changes,
    }  # fmt: skip
    (folder / "probe").mkdir(exist_ok=True)
    path = folder / "probe" / f"smoothness_{step:07d}-1-32-{content['data']}.json"
    path.write_text(json.dumps(content))
    return path


def test_the_largest_measured_value_replaces_the_bound_from_norms(tmp_path, capsys):
    run = write_run(tmp_path / "run", noise=True)
    from_norms = estimate_smoothness(read_run(run))
    write_result(run, 50, 0.8 * L)
    write_result(run, 100, 0.9 * L)
    found = estimate_smoothness(read_run(run))
    assert from_norms.low < found.low == pytest.approx(0.9 * L)
    assert (found.pair, found.is_measured) == ((100, 101), True)
    # One-sided at 2.5 %, as the bound from norms takes the other half, over two results: 1.25 % each.
    value = 0.9 * L
    assert found.bound == pytest.approx(math.sqrt(value**2 - t_quantile(8, 0.975) * 2 * value * 0.1))
    assert measured_smoothness(read_run(run)).bound > found.bound
    call(theory_verb, run, "--steps", 100_000)
    text = " ".join(capsys.readouterr().out.split())
    assert "L estimated from below: 2.7, the change of the gradient over the way from step 100 to 101" in text
    assert "times the lower bound 2.7, from the change of the gradient at steps 100 and 101" in text


def test_a_smaller_measured_value_leaves_the_bound_from_norms(tmp_path):
    run = write_run(tmp_path / "run")
    from_norms = estimate_smoothness(read_run(run))
    write_result(run, 50, 0.5 * from_norms.low)
    found = estimate_smoothness(read_run(run))
    assert (found.low, found.pair, found.is_measured) == (from_norms.low, from_norms.pair, False)


@pytest.mark.parametrize(
    "changes",
    [{"data": "test"}, {"precision": "bf16"}, {"all": {"is_resolved": False}}, {"all": {"smoothness_l2": None}}],
)
def test_a_result_that_is_no_bound_on_L_is_not_used(tmp_path, changes):
    run = write_run(tmp_path / "run")
    write_result(run, 50, 100 * L, **changes)
    assert measured_smoothness(read_run(run)) is None


def test_another_optimizer_has_an_L_too(tmp_path, capsys):
    run = write_run(tmp_path / "run", optimizer="sgd", noise=True)
    call(theory_verb, run, "--steps", 1000)
    assert "or `megatron-lion probe RUN --smoothness N`" in " ".join(capsys.readouterr().out.split())
    write_result(run, 50, 2.5)
    assert estimate_smoothness(read_run(run)).low == 2.5


@pytest.mark.parametrize("confidence", [0.2, 0.5, 0.999])
def test_the_bound_is_at_most_the_estimate(tmp_path, confidence):
    run = write_run(tmp_path / "run")
    write_result(run, 50, 2.0)
    found = measured_smoothness(read_run(run), confidence)
    assert 0 <= found.bound <= found.low


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: {**content, "step": 51}, "is a result of step 51, not of its name"),
        (lambda content: {**content, "format": 2}, "not a smoothness result of format 1"),
        (lambda content: {**content, "all": None}, "not a smoothness result of format 1"),
        (lambda content: [content], "must contain an object"),
        (
            lambda content: {key: value for key, value in content.items() if key != "precision"},
            "precision is missing or",
        ),
        (
            lambda content: {**content, "all": {**content["all"], "smoothness_l2": "5"}},
            "all.smoothness_l2 is missing or has a value that cannot be",
        ),
        (lambda content: {**content, "all": {"smoothness_l2": 5}}, "all.num_parameters is missing"),
        (lambda content: {**content, "all": {**content["all"], "smoothness_l2": -1.0}}, "all.smoothness_l2"),
        (lambda content: {**content, "all": {**content["all"], "smoothness_l2": True}}, "all.smoothness_l2"),
        (lambda content: {**content, "all": {**content["all"], "num_groups": None}}, "all.num_groups"),
        (lambda content: {**content, "all": {**content["all"], "num_groups": 1}}, "all.num_groups"),
        (lambda content: {**content, "num_batches": 4}, "is a result of"),
        (lambda content: {key: value for key, value in content.items() if key != "loss_change"}, "loss_change"),
    ],
)
def test_a_damaged_result_is_refused_by_name(tmp_path, change, part):
    run = write_run(tmp_path / "run")
    path = write_result(run, 50, 2.0)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError) as caught:
        measured_smoothness(read_run(run))
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_the_figure_shows_every_checkpoint_and_refuses_a_run_without_results(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(DataError, match="no result over 1 step"):
        draw_smoothness([run], 1)
    write_result(run, 50, 2.0)
    write_result(run, 100, 1.0, curvature=-0.1)
    write_result(run, 150, None, all={"change_l1_low": None, "change_l1_high": None, "change_l2_corrected": None})
    write_result(run, 200, 1.0, all={"step_linf": 0.0})
    path = draw_smoothness([run, run], 1)
    assert path == run / "figures" / "smoothness.png"
    assert path.read_bytes() == draw_smoothness([run, run], 1).read_bytes()
    assert path.stat().st_size > 10_000


def test_an_exact_result_is_its_own_bound(tmp_path):
    run = write_run(tmp_path / "run")
    write_result(run, 50, 0.9 * L, all={"smoothness_l2_standard_error": 0.0})
    write_result(run, 100, 0.5 * L)
    assert measured_smoothness(read_run(run)).bound == pytest.approx(0.9 * L)


def test_a_noisy_larger_ratio_of_norms_does_not_discard_a_measured_bound(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", noise=True)
    write_result(run, 50, 0.8 * L)
    noisy = estimate.SmoothnessEstimate(L, (0, 50), 0.0, 0.95)
    monkeypatch.setattr(estimate, "_from_norms", lambda *_: noisy)
    found = estimate_smoothness(read_run(run))
    assert found.low == L
    assert found.bound == pytest.approx(measured_smoothness(read_run(run), 0.975).bound)


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
def test_the_bound_over_many_results_holds(tmp_path, monkeypatch, signal):
    """Simulated batches with a weak or no signal: among many results, those that pass by chance must not give a bound."""
    generator, groups, results, wrong, trials = np.random.default_rng(7), 9, 20, 0, 300
    run = read_run(write_run(tmp_path / "run"))
    truth = signal / math.sqrt(20) * np.ones(20)
    for _ in range(trials):
        found = []
        for step in range(results):
            batches = truth + generator.standard_normal((groups, 20)) * math.sqrt(groups / 20)
            square, error = unbiased_square(batches)
            value = math.sqrt(max(0.0, square))
            part = {
                "smoothness_l2": value, "smoothness_l2_standard_error": error / (2 * value) if value else None,
                "is_resolved": square > t_quantile(groups - 1) * error, "num_groups": groups,
            }  # fmt: skip
            found.append({"data": "fixed", "precision": "fp32", "step": step, "num_steps": 1, "all": part})
        monkeypatch.setattr(estimate, "read_all_smoothness", lambda _, found=found: found)
        measured = measured_smoothness(run)
        wrong += measured is not None and measured.bound > signal
    assert wrong / trials <= 0.05


def unbiased_square(batches):
    """‖mean‖² without the noise, and its jackknife error."""
    n = len(batches)

    def of(part):
        mean = part.mean(0)
        return mean @ mean - ((part - mean) ** 2).sum() / (len(part) - 1) / len(part)

    left_out = np.array([of(np.delete(batches, place, 0)) for place in range(n)])
    return of(batches), math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
