"""The bound at a run's own settings: on simulated LION runs, from sparse records, and what the report and figures show."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from test_run_theory import SIGMA2, STEPS, D, L, write_run

from megatron_lion.commands import theory as theory_verb
from megatron_lion.errors import ConfigError
from megatron_lion.runs.record import read_run
from megatron_lion.runs.series import Series
from megatron_lion.theory.bound_report import bound_section
from megatron_lion.theory.run_bounds import run_bound
from megatron_lion.theory.schedule_bound import schedule_bound

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from theory_coverage import Scenario, simulate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [write_run(base / f"seed{seed}", seed, noise=True) for seed in range(2)]


@pytest.fixture(scope="module")
def run(folders):
    return read_run(folders[0])


def call(*words):
    parser = ArgumentParser(exit_on_error=False)
    theory_verb.add_arguments(parser)
    theory_verb.run(parser.parse_args([str(word) for word in words]))


def test_both_sides_are_those_of_the_records(run):
    found = run_bound(run, smoothness=L, noise_variance=SIGMA2, gap=300.0)
    steps, norms = run.need("probe/grad_l1").arrays()
    dense = np.interp(np.arange(1, STEPS + 1), steps + 1, norms)
    assert found.measured.tolist() == pytest.approx((np.cumsum(dense) / np.arange(1, STEPS + 1)).tolist())
    (curve,) = found.curves
    expected = schedule_bound(
        np.full(STEPS, 0.01), beta1=0.9, beta2=0.95, L=L, sigma=math.sqrt(SIGMA2), gap=300.0, d=D,
        first_grad_l2=run.need("probe/grad_l2_corrected").values[0], reach=0.01 * max(run.need("probe/theta_linf").values),
    )  # fmt: skip
    assert curve.terms.total.tolist() == pytest.approx(expected.total.tolist())
    assert np.all(found.measured < curve.terms.total)


def test_a_changing_rate_weights_both_sides(run):
    rates = Series((1, STEPS), (0.0, 0.02))
    found = run_bound(replace(run, metrics={**run.metrics, "optim/lr": rates}), smoothness=L, gap=300.0)
    k = np.arange(1, STEPS + 1)
    lr = 0.02 * (k - 1) / (STEPS - 1)
    steps, norms = run.need("probe/grad_l1").arrays()
    expected = (lr * np.interp(k, steps + 1, norms)).sum() / lr.sum()
    assert found.measured[-1] == pytest.approx(expected)
    assert math.isnan(found.measured[0])
    variance = np.interp(k, steps + 1, run.need("probe/noise_variance").values)
    reach = 0.01 * max(run.need("probe/theta_linf").values)
    norm = run.need("probe/grad_l2_corrected").values[0]
    problem = {"beta1": 0.9, "beta2": 0.95, "L": L, "gap": 300.0, "d": D, "first_grad_l2": norm, "reach": reach}
    assert found.curves[0].terms.total[-1] == pytest.approx(
        schedule_bound(lr, sigma=np.sqrt(variance), **problem).total[-1]
    )


def test_the_bound_holds_on_simulated_runs_with_their_own_estimates_of_the_noise():
    """L is given; Δ is assumed with f* = 0, which is above the true one."""
    found = simulate(Scenario(name="", lr=0.01), 20, 0)
    for record in found.records:
        both = run_bound(replace(record, settings={**record.settings, "optimizer.betas": (0.9, 0.99)}), smoothness=3.0)
        assert both.missing == ""
        assert np.all(both.measured < both.curves[0].terms.total)
        assert "replaces it" in both.facts[0]


def test_without_L_there_are_three_estimates_and_the_report_states_it(run):
    found = run_bound(run)
    levels = [curve.smoothness for curve in found.curves]
    assert levels == pytest.approx([levels[0], 10 * levels[0], 100 * levels[0]])
    text = bound_section(found)
    assert "so the right sides are estimates, not bounds" in text
    assert "assumed to be 1, 10 or 100 times the lower bound" in text
    assert "σ²: measured at 9 probes" in text
    assert "assumed, the loss at step 0 with f* = 0" in text
    assert "estimates, not bounds" not in bound_section(run_bound(run, smoothness=L))


def test_what_is_missing_is_named(run):
    bare = {key: value for key, value in run.metrics.items() if key in ("optim/lr", "probe/grad_l1", "probe/grad_l2")}
    found = run_bound(replace(run, metrics={**bare, "probe/grad_l2": Series((0, 50), (2.0, 2.0))}))
    assert found.curves == ()
    assert found.missing == "σ²: give --noise-variance; Δ: give --gap; L: give --smoothness"
    assert "no bound without σ²: give --noise-variance" in bound_section(found)
    assert run_bound(replace(run, optimizer="sgd")) is None
    assert run_bound(replace(run, metrics={key: run.metrics[key] for key in run.metrics if key != "optim/lr"})) is None
    assert "it needs a LION run" in bound_section(None)


def test_clipping_dropout_and_the_start_are_stated(run):
    settings = {**run.settings, "optimizer.clip_grad": 5.0, "model.hidden_dropout": 0.1}
    facts = "\n".join(run_bound(replace(run, settings=settings), smoothness=L).facts)
    share = np.mean(np.array(run.need("optim/grad_l2").values) > 5)
    assert 0.1 < share < 0.9
    assert f"g was clipped to norm 5 in {share:.0%} of the logged steps" in facts
    assert "training used dropout, the probes did not" in facts
    assert "m⁰ = 0; ‖∇f(θ¹)‖₂ = " in facts
    first = run_bound(replace(run, settings={**settings, "optimizer.init_exp_avg": "first_gradient"}), smoothness=L)
    assert "m⁰ = g¹" in first.facts
    assert first.curves[0].terms.start[-1] < run_bound(run, smoothness=L).curves[0].terms.start[-1]
    open_box = {key: value for key, value in run.settings.items() if key != "optimizer.weight_decay"}
    wider = run_bound(replace(run, settings=open_box), smoothness=L)
    assert "λ‖θ‖∞ ≤ 1: assumed (the box)" in wider.facts
    assert wider.curves[0].terms.drift[-1] > run_bound(run, smoothness=L).curves[0].terms.drift[-1]


def test_the_verb_prints_slopes_and_bounds_and_draws_them(folders, tmp_path, capsys):
    out = tmp_path / "deep" / "figures"
    call(*folders, "--smoothness", L, "--output", out)
    text = capsys.readouterr().out
    assert text.count("## Bound at the settings of") == 2
    assert "| ‖∇f‖₂ without noise | " in text
    assert "95% intervals, Student's t over the runs" in text
    assert sorted(path.name for path in out.iterdir()) == ["bound_1.png", "bound_2.png", "rate_constants.png"]
    for path in out.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    call(folders[0], "--output", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["bound.png", "rate_constants.png"]
    with pytest.raises(ConfigError, match="--output draws runs: give a RUN"):
        call("--output", out)


def test_an_sgd_run_has_its_constant_but_no_bound(tmp_path, capsys):
    folder = write_run(tmp_path / "sgd", optimizer="sgd")
    call(folder, "--output", tmp_path / "out", "--weighting", "probes")
    assert "No bound: it needs a LION run" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rate_constants.png"]


def test_the_figures_draw_the_curves_of_the_records(run, tmp_path, monkeypatch):
    """The lines of the axes are read back: running means that touch c K^(−1/4) once, and the bound above the measured mean."""
    from megatron_lion.theory import bound_figures

    kept = []
    monkeypatch.setattr(bound_figures, "save_figure", lambda figure, path: kept.append(figure) or path)
    bound_figures.plot_rates([run], "linear", tmp_path / "a.png")
    steps, norms = run.need("probe/grad_l1").arrays()
    dense = np.interp(np.arange(1, STEPS + 2), steps + 1, norms) / math.sqrt(D)
    mean, guide, point = kept[0].axes[0].lines
    K, drawn = mean.get_data()
    assert drawn.tolist() == pytest.approx([dense[: int(k)].mean() for k in K])
    constant = max(k**0.25 * dense[:k].mean() for k in range(1, STEPS + 2))
    assert guide.get_ydata().tolist() == pytest.approx((constant * K**-0.25).tolist())
    assert np.all(drawn <= guide.get_ydata() * (1 + 1e-12))
    assert point.get_ydata()[0] == pytest.approx(dense[: int(point.get_xdata()[0])].mean())
    bound_figures.plot_bound(run_bound(run, smoothness=L), "run", tmp_path / "b.png")
    measured, bound = kept[1].axes[0].lines
    assert np.all(measured.get_ydata() < bound.get_ydata())


def cut(run, keys, first=0, last=10**9):
    """The run without the values of some metrics outside first … last."""
    metrics = dict(run.metrics)
    for key in keys:
        series = metrics[key]
        kept = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if first <= step <= last]
        metrics[key] = Series(*map(tuple, zip(*kept, strict=True)))
    return replace(run, metrics=metrics)


def test_without_a_probe_at_step_0_there_is_no_bound_unless_the_gap_is_given(run):
    probes = [key for key in run.metrics if key.startswith("probe/")]
    first = run.need("probe/grad_l1").steps[1]
    late = cut(run, probes, first=first)
    found = run_bound(late, smoothness=L)
    assert not found.curves
    assert "--gap" in found.missing
    assert any(f"R before step {first}: assumed" in fact for fact in found.facts)
    given = run_bound(late, smoothness=L, gap=300.0)
    assert given.curves
    assert any(f"assumed equal to that of the first probe at step {first}" in fact for fact in given.facts)


def test_the_report_states_where_rates_and_probes_end_and_what_is_missing(run):
    probes = [key for key in run.metrics if key.startswith("probe/")]
    steps = run.need("probe/grad_l1").steps
    found = run_bound(cut(run, ["optim/lr"], last=150), smoothness=L)
    assert any("η after step 150: assumed" in fact for fact in found.facts)
    ended = run_bound(cut(run, probes, last=steps[-2]), smoothness=L)
    assert any(f"R is known up to step {steps[-2]:,} of {run.last_step:,}" in fact for fact in ended.facts)
    one_less = dict(run.metrics)
    for key in ("probe/grad_l1", "probe/kkt_residual"):
        if key in one_less:
            series = one_less[key]
            one_less[key] = Series(series.steps[:1] + series.steps[2:], series.values[:1] + series.values[2:])
    one_less["probe/num_batches"] = Series(tuple(steps), (20.0,) * len(steps))
    holed = run_bound(replace(run, metrics=one_less), smoothness=L)
    assert any(f"1 of {len(steps)} probes have no finite R" in fact for fact in holed.facts)
    moving = {**run.metrics, "probe/is_moving": Series(tuple(steps), (1.0,) * len(steps))}
    assert any("moving windows" in fact for fact in run_bound(replace(run, metrics=moving), smoothness=L).facts)


def test_rates_of_zero_have_no_bound_and_a_run_without_decay_no_box(run):
    zero = {**run.metrics, "optim/lr": Series((1, STEPS), (0.0, 0.0))}
    assert run_bound(replace(run, metrics=zero), smoothness=L) is None
    assert "rates above 0" in bound_section(None)
    no_decay = replace(run, settings={**run.settings, "optimizer.weight_decay": 0.0})
    assert any(fact.startswith("λ = 0: there is no box") for fact in run_bound(no_decay, smoothness=L).facts)


def test_a_run_given_twice_and_runs_of_other_settings_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="the same run is given twice"):
        call(folders[0], folders[0])
    other = write_run(tmp_path / "other", 7, noise=True)
    text = (other / "config.yaml").read_text()
    assert "name: lion" in text
    (other / "config.yaml").write_text(text.replace("name: lion", "name: adamw"))
    with pytest.raises(ConfigError, match="differ in more than their seed"):
        call(folders[0], other)
    with pytest.raises(ConfigError, match="--output is empty"):
        call(folders[0], "--output", "")
