"""Estimates from run folders, and `theory` and `toy` end to end, on a LION run whose L, σ² and Δ are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from megatron_lion.commands import theory as theory_verb
from megatron_lion.commands import toy as toy_verb
from megatron_lion.errors import CheckpointError, ConfigError, StorageError
from megatron_lion.intervals import jackknife_error
from megatron_lion.runs.record import read_run
from megatron_lion.theory.advice import advise, implied_smoothness
from megatron_lion.theory.estimate import estimate_gap, estimate_smoothness, estimate_variance

D, L, SIGMA2, STEPS, BATCHES = 400, 3.0, 0.5, 400, 20


def write_run(folder, seed=0, optimizer="lion", noise=False, model=None, probes=None):
    """A LION run on ½ θᵀHθ + 1 with curvature up to L and gradient noise of variance SIGMA2, logged like training.

    The probes write an estimate of their noise only with `noise`, as frozen probes do. `model` and `probes` are these
    sections of config.yaml.
    """
    generator = np.random.default_rng(seed)
    curvature = np.linspace(0.01, L, D)
    theta, exp_avg, lr = generator.standard_normal(D), np.zeros(D), 0.01
    noise_std = math.sqrt(SIGMA2 / D)
    lines = []

    def probe(step):
        singles = generator.standard_normal((BATCHES, D)) * noise_std if noise else None
        rest = (
            generator.standard_normal(D) * noise_std / math.sqrt(BATCHES) if singles is None else singles.mean(axis=0)
        )
        grad = curvature * theta + rest
        lines.append(
            {
                "step": step,
                "time": 1.0,
                "probe/loss": float(0.5 * curvature @ theta**2 + 1),
                "probe/grad_l1": float(np.abs(grad).sum()),
                "probe/grad_l2": float(np.linalg.norm(grad)),
                "probe/theta_linf": float(np.abs(theta).max()),
                "probe/num_batches": BATCHES,
                "probe/num_parameters": D,
                **(noise_of(singles, float(np.linalg.norm(grad))) if singles is not None else {}),
            }
        )

    probe(0)
    for step in range(1, STEPS + 1):
        grad = curvature * theta + generator.standard_normal(D) * noise_std
        lines.append({"step": step, "time": 1.0, "optim/lr": lr, "optim/grad_l2": float(np.linalg.norm(grad))})
        theta = theta - lr * (np.sign(0.9 * exp_avg + 0.1 * grad) + 0.01 * theta)
        exp_avg = 0.95 * exp_avg + 0.05 * grad
        if step % 50 == 0:
            probe(step)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"format": 1, "optimizer": optimizer, "num_parameters": D}))
    settings = {
        "optimizer": {"name": optimizer, "lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.01},
        "train": {"steps": STEPS},
        "model": model or {},
        "probe": probes or {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def noise_of(singles, norm):
    """What a frozen probe writes about the noise of its batches."""
    parts = ((singles - singles.mean(axis=0)) ** 2).sum(axis=1)
    variance = float(parts.sum() / (BATCHES - 1))
    left_out = [float((parts.sum() - part * BATCHES / (BATCHES - 1)) / (BATCHES - 2)) for part in parts]
    rest = variance / BATCHES
    return {
        "probe/noise_variance": variance,
        "probe/noise_variance_standard_error": jackknife_error(variance, left_out, [1] * BATCHES),
        "probe/noise_groups": BATCHES,
        "probe/grad_l2_corrected": math.sqrt(max(0.0, norm**2 - rest)),
        "probe/noise_share": rest / norm**2,
        "probe/loss_standard_error": 0.01,
        "probe/is_moving": 0,
    }


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [write_run(base / f"seed{seed}", seed) for seed in range(3)]


def call(verb, *words):
    parser = ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    verb.run(parser.parse_args([str(word) for word in words]))


def test_run_without_dimension_or_probes_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1, "train/loss": 2.0}\n')
    with pytest.raises(CheckpointError, match=r"neither run.json nor a probe has num_parameters"):
        call(theory_verb, tmp_path)
    (tmp_path / "run.json").write_text('{"num_parameters": 10}')
    with pytest.raises(CheckpointError, match=r"no 'probe/grad_l1'; train with --probe.every"):
        call(theory_verb, tmp_path)
    (tmp_path / "config.yaml").write_text("train: [")
    with pytest.raises(CheckpointError, match=r"config.yaml: cannot be read"):
        call(theory_verb, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist; give the run_dir"):
        call(theory_verb, tmp_path / "nowhere")


def test_estimates_without_the_probes_noise_are_near_the_truth(run_folders):
    for folder in run_folders:
        run = read_run(folder)
        noise = estimate_variance(run)
        assert noise is not None
        # While ∇f is large and falls fast, its curvature between probes is the main error; at the end it is small.
        assert not noise.trusted[:6].any()
        assert noise.trusted[-1]
        assert noise.largest == pytest.approx(SIGMA2, rel=0.2)
        probe_squared = run.series("probe/grad_l2").arrays()[1] ** 2
        assert noise.signal_l2_squared[-1] == pytest.approx(probe_squared[-1] - SIGMA2 / BATCHES, rel=0.05)
        assert np.array_equal(noise.signal_l2_squared[:6], probe_squared[:6])
        assert len(noise.steps) == 9
        gap = estimate_gap(run)
        assert gap is not None
        assert gap.first_step == 0
        assert gap.low <= gap.first_loss - 1 <= gap.high
        assert gap.low == pytest.approx(gap.first_loss - 1, rel=0.05)
        bound = estimate_smoothness(run, noise)
        assert bound is not None
        assert 0.1 < bound.low <= L
        assert bound.bound is None
        assert (gap.low_bound, gap.high_bound) == (None, None)


def test_smoothness_is_left_alone_where_the_way_is_unknown(tmp_path):
    run = read_run(write_run(tmp_path / "sgd", optimizer="sgd"))
    assert estimate_smoothness(run) is None


def test_advice_is_corollary_3_and_its_inverse():
    advice = advise(5000, L=7.0, noise_variance=2.0, gap=120.0, d=2)
    assert advice.beta == pytest.approx(1 - math.sqrt(420 / 5000))
    assert advice.bound == pytest.approx(15 * math.sqrt(2) * 5000**-0.25 * 1680**0.25)
    assert advice.smallest_bound < advice.tight_bound < advice.bound
    implied = implied_smoothness(5000, beta2=advice.beta, lr=advice.lr, noise_variance=2.0, gap=120.0, d=2)
    assert (implied.from_beta2, implied.from_lr) == pytest.approx((7.0, 7.0))
    early = advise(100, L=7.0, noise_variance=2.0, gap=120.0, d=2)
    assert early.beta is None
    assert not early.holds
    with pytest.raises(ValueError, match=r"noise_variance = 0"):
        advise(100, L=7.0, noise_variance=0.0, gap=120.0, d=2)
    with pytest.raises(ValueError, match=r"beta2 = 1"):
        implied_smoothness(100, beta2=1.0, lr=0.1, noise_variance=2.0, gap=1.0, d=2)


def test_theory_verb_over_seeds(run_folders, capsys):
    call(theory_verb, *run_folders, "--steps", 100_000)
    text = capsys.readouterr().out
    assert "| c_LION (‖∇f‖₁/√d) |" in text
    assert "of the mean over 3 runs" in text
    assert "still grows" not in text
    assert text.count("## Corollary 3 for") == 3
    assert "| L × 100, Δ with f* = 0 |" in text
    assert "beta1 = beta2 (Signum)" in text
    assert "The run used β = (0.9, 0.95) and a peak η of 0.01." in text
    assert text.count("because the records have no probe/noise_variance; no interval, because") == 3
    assert text.count("no bounds with the errors of the losses") == text.count("no confidence bound") == 3
    assert (
        "because the records have no probe/grad_l2_corrected; the noise that remains in it makes c_SGD too large."
        in text
    )
    assert "The records have no noise share." in text


def test_theory_verb_says_that_a_constant_still_grows(tmp_path, capsys):
    probes = [{"step": s, "probe/grad_l1": 3.0, "probe/grad_l2": 1.0, "probe/num_parameters": 9} for s in (0, 50)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    call(theory_verb, tmp_path, "--steps", 100)
    assert "A maximum at the last K still grows" in capsys.readouterr().out


def test_theory_verb_plans_the_whole_schedule_of_a_run_stopped_early(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["train"]["stop_after"] = 50
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    call(theory_verb, folder)
    assert f"- K = {STEPS}, d = {D}" in capsys.readouterr().out


def test_theory_verb_says_what_it_cannot_estimate(tmp_path, capsys):
    folder = write_run(tmp_path / "run", optimizer="sgd")
    call(theory_verb, folder)
    text = capsys.readouterr().out
    assert (
        "not estimated: L (needs a LION run with two probes whose norms differ, or `megatron-lion probe RUN --smoothness N`): "
        "give --smoothness" in text
    )
    assert "| scenario |" not in text
    assert text.count("beta1 = beta2 (Signum)") == 1
    call(theory_verb, folder, "--smoothness", 3, "--noise-variance", 0.5, "--gap", 200)
    assert "| L given, Δ given | 3 | 0.5 | 200 |" in capsys.readouterr().out


def test_theory_verb_from_numbers_alone(capsys):
    call(theory_verb, "--steps", 2000, "--smoothness", 7, "--noise-variance", 2, "--gap", 120, "--dimension", 2)
    assert "| given | 7 | 2 | 120 | 0.54174 | 0.0443 | 420 | yes | 20.3 |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"without a RUN, these flags are needed: --gap --dimension"):
        call(theory_verb, "--steps", 2000, "--smoothness", 7, "--noise-variance", 2)
    with pytest.raises(ConfigError, match=r"--smoothness is -7: give a number above 0"):
        call(theory_verb, "--steps", 2, "--smoothness", -7, "--noise-variance", 2, "--gap", 1, "--dimension", 2)


def test_theory_verb_refuses_runs_of_different_size(run_folders, tmp_path):
    other = write_run(tmp_path / "other")
    (other / "run.json").write_text('{"optimizer": "lion", "num_parameters": 7}')
    with pytest.raises(ConfigError, match=r"differ in num_parameters"):
        call(theory_verb, run_folders[0], other)


def test_toy_verb_writes_tables_and_figures(tmp_path, capsys):
    out = tmp_path / "deep" / "toy"
    call(toy_verb, "--output", out)
    text = capsys.readouterr().out
    written = sorted(path.name for path in out.iterdir())
    assert written == ["toy.csv", "toy.md", "toy_inequality.png", "toy_paths.png", "toy_theorem.png"]
    assert (out / "toy.md").read_text() in text
    assert "| constrained | 2000 |" in text
    assert "does not state β₁" in text
    rows = (out / "toy.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 201
    assert rows[-1].startswith("unconstrained,2000,")
    assert rows[-1].endswith(",1")
    for figure in out.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size < 200 * 1024


def test_toy_verb_takes_other_settings(tmp_path, capsys):
    call(
        toy_verb, "--output", tmp_path, "--weight-decay", 0, "--lr", 0.02, "--betas", 0.95, 0.98, "--steps", 50,
        "--starts", 1, "--repeats", 1, "--no-figures",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "| constrained" not in text
    assert "none are shown" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.csv", "toy.md"]


def test_toy_verb_figures_without_a_box(tmp_path):
    call(toy_verb, "--output", tmp_path, "--weight-decay", 0, "--steps", 20, "--starts", 2, "--repeats", 1)
    assert (tmp_path / "toy_paths.png").exists()
    assert (tmp_path / "toy_inequality.png").exists()


def test_toy_verb_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"lr = 20: expected lr <= 1/weight_decay = 10"):
        call(toy_verb, "--output", tmp_path, "--lr", 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file: cannot be made: File exists"):
        call(toy_verb, "--output", tmp_path / "file", "--steps", 10, "--no-figures")
