"""Smoothness along steps: brute force from checkpoints, the same at every layout, quadratics with known constants, errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_distributed
from fake_model import Whole, norms_of
from test_after_the_fact import commands
from tiny import error_of, read_weights, tiny_config, train, write_corpus

from megatron_lion.gradient.batch_groups import GroupedBatches, difference_of
from megatron_lion.gradient.noise import estimate_noise, l1_bounds
from megatron_lion.intervals import t_quantile

BATCHES = 8
WORDS = ["--steps", "2", "--smoothness", "2"]
NAME = f"smoothness_0000002-2-{BATCHES}-fixed.json"


def config_of(folder, corpus, **changes):
    return tiny_config(
        folder, corpus,
        **{"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 3, "probe__num_batches": BATCHES, "optimizer__lr": 2e-3,
           "model__hidden_dropout": 0.1, "optimizer__weight_decay": 0.1, "train__test_every": 0, **changes},
    )  # fmt: skip


def everything(rank, configs, jobs):
    """Work of one process: trains, computes the gradient of each batch at steps 2 and 4 of the first run, runs commands."""
    from tiny import opened_run

    from megatron_lion.gradient.accumulate import FullGradient
    from megatron_lion.runs.steps import open_checkpoint, step_folder
    from megatron_lion.train.restore import restore_run

    for config in configs.values():
        train(config)
    config = configs["gpt2"]
    found = {}
    # A run that probes opens the samples of the probe.
    with opened_run(config_of(config.run_dir, config.data.path[0], probe__every=1)) as run:
        for step in (2, 4):
            restore_run(run, open_checkpoint(step_folder(run.run_dir, step)))
            samples, sums, before = run.probe_batches(2), [], None
            with FullGradient(
                run.model, run.optimizer, run.forward_step, run.ranks, num_microbatches=config.num_microbatches(1),
                micro_batch_size=config.micro_batch_size, seq_length=16, vocab_size=run.corpora.vocab_size,
            ) as full:  # fmt: skip
                for _ in range(BATCHES):
                    full.add(samples)
                    full.read()
                    now = {shard.name: shard.grad.double().clone() for shard in full.shards()}
                    sums.append({name: now[name] - (before[name] if before else 0) for name in now})
                    before = now
                found[step] = {"sums": sums, "losses": full.losses}
        found["uncounted"] = uncounted(run)
    folder = Path(config.run_dir)
    shutil.copytree(folder, folder.with_name("alone"))
    return found, commands(rank, jobs) | {"stopped": stopped_in_the_first_step(folder)}


def uncounted(run):
    """The errors of samples without a counted token, and of an objective that counts nothing of another part of its loss."""
    from megatron_lion.gradient.smoothness import gradient_along, own_weights

    def blank():
        for batch in run.probe_batches(2):
            yield {**batch, "loss_mask": batch["loss_mask"] * 0}

    step = own_weights(run)
    errors = [error_of(gradient_along, run, blank(), step)]
    batches, objective = run.probe_batches(2), run.objective
    run.objective = SimpleNamespace(
        count_names=(), uncounted=lambda counts: "num_pairs", forward_step=objective.forward_step
    )
    return [*errors, error_of(gradient_along, run, batches, step)]


def stopped_in_the_first_step(folder):
    """Sends a stop signal after the first of four steps in memory; returns the places that were reported, and the error."""
    from megatron_lion.config import ParallelConfig
    from megatron_lion.train.probe_checkpoints import probe_config
    from megatron_lion.train.smoothness_checkpoints import smoothness_checkpoints

    places = []

    def on_batch(step, done, total):
        places.append((done, total))
        os.kill(os.getpid(), signal.SIGTERM)

    config = probe_config(folder, probe={}, parallel=ParallelConfig(), device="cpu")
    error = error_of(lambda: list(smoothness_checkpoints(config, [2], 4, on_batch=on_batch)))
    return places, error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoothness")
    corpus = write_corpus(folder / "corpus", documents=200)
    configs = {
        "gpt2": config_of(folder / "gpt2", corpus),
        "bf16": config_of(
            folder / "bf16", corpus, train__precision="bf16", optimizer__name="adamw", probe__dropout=True
        ),
    }
    jobs = {
        "gpt2": [folder / "gpt2", *WORDS], "bf16": [folder / "bf16", *WORDS],
        "all": [folder / "gpt2", "--steps", "all", "--smoothness", 2, "--num-batches", 4],
        "alone": [folder / "alone", "--steps", "4", "--smoothness", 2, "--num-batches", 4],
        "one batch": [folder / "gpt2", "--steps", "2", "--smoothness", 1, "--num-batches", 1],
        "again": [folder / "gpt2", *WORDS, "--figures"],
        "too late": [folder / "gpt2", "--steps", "2,6", "--smoothness", 1],
        "beside": [folder / "gpt2", "--steps", "2", "--smoothness", 1, "--beside", folder / "bf16"],
        "far too many": [folder / "gpt2", "--steps", "2", "--smoothness", 10**12],
        "whole": [folder / "gpt2", "--steps", "2", "--smoothness", 2, "--num-batches", "all"],
        "no step": [folder / "gpt2", "--steps", "2", "--smoothness", 0],
        "dropout": [folder / "gpt2", "--steps", "2", "--smoothness", 1, "--dropout"],
        "only the last": [folder / "gpt2", "--steps", "latest", "--smoothness", 1],
    }  # fmt: skip
    raw, printed = run_distributed(everything, 1, configs, jobs)[0]
    return SimpleNamespace(folder=folder, raw=raw, printed=printed)


@pytest.fixture(scope="module")
def by_layout(made):
    """Output of the same command at other layouts."""
    layouts = {
        "TP2": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
        "PP2": ["--pipeline-model-parallel-size", 2],
        "DP2": ["--micro-batch-size", 2],
    }
    for name in layouts:
        shutil.copytree(made.folder / "gpt2", made.folder / name)
        (made.folder / name / "probe" / NAME).unlink()
    return run_distributed(
        commands, 2, {name: [made.folder / name, *WORDS, *flags] for name, flags in layouts.items()}
    )[0]


def result(made, name):
    return json.loads((made.folder / name / "probe" / NAME).read_text())


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def test_the_values_equal_brute_force_from_two_checkpoints(made):
    """The steps in memory are the run's own: with dropout they end at the weights of the checkpoint that the run saved."""
    assert not made.printed["gpt2"][1][0], made.printed["gpt2"]
    found, (before, after) = result(made, "gpt2"), (made.raw[2], made.raw[4])
    weights = [read_weights(made.folder / "gpt2", step) for step in (2, 4)]
    moved = {}
    for name in weights[0]:
        change = weights[1][name].double() - weights[0][name].double()
        own = name.removeprefix("model.").replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        own = own.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        if own.startswith("decoder.layers."):  # a checkpoint stacks the layers
            moved |= {own.replace("layers.", f"layers.{layer}.", 1): part for layer, part in enumerate(change)}
        else:
            moved[own] = change
    counts = np.array([count for _, count in before["losses"]], dtype=float)
    changes = np.array([(flat(b) - flat(a)) / n for a, b, n in zip(before["sums"], after["sums"], counts, strict=True)])
    step, mean = _in_order(moved, before["sums"][0]), changes.mean(0)
    block = found["all"]
    assert block["step_linf"] == pytest.approx(np.abs(step).max(), rel=1e-6)
    assert block["step_l2"] == pytest.approx(np.linalg.norm(step), rel=1e-6)
    assert block["change_l1"] == pytest.approx(np.abs(mean).sum(), rel=1e-5)
    assert block["change_l2"] == pytest.approx(np.linalg.norm(mean), rel=1e-5)
    assert found["curvature"] == pytest.approx(mean @ step, rel=1e-4)
    slope = np.mean([flat(a) / n for a, n in zip(before["sums"], counts, strict=True)], axis=0) @ step
    assert found["first_order_change"] == pytest.approx(slope, rel=1e-4)
    losses = [sum(loss for loss, _ in point["losses"]) / counts.sum() for point in (before, after)]
    assert found["loss_before"] == pytest.approx(losses[0], rel=1e-6)
    assert found["loss_change"] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    # The unbiased estimate from cross products of the batches, with the batches of the data set that were not read.
    n, whole = BATCHES, found["population_samples"] / 8
    scatter = (np.square(changes).sum() - n * mean @ mean) / (n - 1)
    clean = mean @ mean - scatter * (1 / n - 1 / whole)
    assert block["change_l2_corrected"] == pytest.approx(math.sqrt(clean), rel=1e-4)
    assert block["smoothness_l2"] == pytest.approx(math.sqrt(clean) / np.linalg.norm(step), rel=1e-4)
    assert block["smoothness_linf_high"] == pytest.approx(np.abs(mean).sum() / np.abs(step).max(), rel=1e-5)
    assert 0 < block["smoothness_linf_low"] < block["smoothness_linf_high"]
    for kinds in ("kinds", "layers"):
        assert sum(part["change_l1"] for part in found[kinds].values()) == pytest.approx(block["change_l1"], rel=1e-6)


def _in_order(moved, like):
    assert moved.keys() == like.keys()
    return np.concatenate([moved[name].numpy().ravel() for name in sorted(like)])


def test_a_trapezoid_of_both_gradients_gives_the_change_of_the_loss(made):
    """f(θ') − f(θ) = ½⟨∇f(θ) + ∇f(θ'), Δθ⟩ up to the third order; the first order alone is off by half the curvature."""
    found = result(made, "gpt2")
    assert abs(found["curvature"]) > 0.02 * abs(found["first_order_change"]), "the test needs a step that bends"
    rest = found["loss_change"] - found["first_order_change"] - found["curvature"] / 2
    assert abs(rest) < 0.2 * abs(found["curvature"] / 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_every_layout_has_the_same_values(made, by_layout, layout):
    """With dropout the steps have other masks at another layout, so the points differ: only the sizes are compared."""
    assert not by_layout[layout][1][0], by_layout[layout]
    found, expected = result(made, layout), result(made, "gpt2")
    assert found["all"]["num_parameters"] == expected["all"]["num_parameters"]
    assert found["loss_before"] == pytest.approx(expected["loss_before"], rel=1e-6)
    for key in ("step_l2", "change_l1", "change_l2", "smoothness_l2", "smoothness_linf_high"):
        assert found["all"][key] == pytest.approx(expected["all"][key], rel=0.3), key
    rest = found["loss_change"] - found["first_order_change"] - found["curvature"] / 2
    assert abs(rest) < 0.2 * abs(found["curvature"] / 2)
    assert sum(part["change_l1"] for part in found["kinds"].values()) == pytest.approx(
        found["all"]["change_l1"], rel=1e-5
    )


def test_the_steps_move_the_weights_that_the_gradient_is_computed_at(made):
    """In bf16 the model's own weights; the rounding is named in the table."""
    printed, error = made.printed["bf16"]
    assert not error[0], error
    weights = [read_weights(made.folder / "bf16", step) for step in (2, 4)]
    peak = max(float((weights[1][name].float() - weights[0][name].float()).abs().max()) for name in weights[0])
    assert result(made, "bf16")["all"]["step_linf"] == pytest.approx(peak, rel=1e-6)
    assert "in bf16, weights and activations are rounded" in " ".join(printed.split())


def test_a_checkpoint_measured_after_another_has_the_same_result(made):
    """The steps that were taken in memory before leave nothing behind: not in weights, momentum, data or random states."""
    name = "smoothness_0000004-2-4-fixed.json"
    found = [json.loads((made.folder / run / "probe" / name).read_text()) for run in ("gpt2", "alone")]
    for content in found:
        del content["seconds"], content["sha256"]
    assert found[0] == found[1]


def test_one_batch_gives_no_smoothness_without_noise_and_the_table_states_it(made):
    printed, error = made.printed["one batch"]
    assert not error[0], error
    assert "too few batches for a standard error" in " ".join(printed.split())
    found = json.loads((made.folder / "gpt2" / "probe" / "smoothness_0000002-1-1-fixed.json").read_text())["all"]
    assert found["change_l1"] > 0
    assert found["smoothness_l2"] is found["smoothness_linf_low"] is None


def test_results_are_kept_and_the_run_is_not_changed(made):
    assert "(found)" in made.printed["again"][0]
    assert str(made.folder / "gpt2" / "figures" / "smoothness.png") in made.printed["again"][0]
    printed = made.printed["all"][0]
    assert [f"│    {step} │" in printed for step in (2, 4, 6)] == [True, True, False]
    lines = [json.loads(line) for line in (made.folder / "gpt2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("too late", "the run ends at step 6, 0 step(s) after step 6, and 1 are needed; give --steps of at most 5"),
        ("no step", "--smoothness 0: must be at least 1"),
        ("dropout", "leave out --dropout"),
        ("beside", "--beside: needs --figures"),
        ("far too many", "4 step(s) after step 2, and 1000000000000 are needed; give fewer steps"),
        ("only the last", "give --steps of another checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused(made, case, part):
    kind, message = made.printed[case][1]
    assert kind == "ConfigError"
    assert part in message


def test_samples_that_count_nothing_are_refused_like_those_of_a_probe(made):
    (blank, in_batch), (part, in_all) = made.raw["uncounted"]
    assert (blank, part) == ("DataError", "DataError")
    assert (
        "probe: the loss counts nothing in batch 1 of the training samples (num_tokens is 0); check the data"
        in in_batch
    )
    assert "counts nothing in all 8 batches of the training samples (num_pairs is 0)" in in_all


def test_a_stop_signal_ends_the_steps_in_memory(made):
    places, (kind, message) = made.printed["stopped"]
    assert places == [(1, 4 + 2 * BATCHES)]
    assert kind == "StoppedOnRequest"
    assert "stopped at step 2; run the same command" in message


def test_the_whole_data_set_has_no_error_and_is_enclosed_by_the_bounds_of_a_part(made):
    assert not made.printed["whole"][1][0], made.printed["whole"]
    whole = json.loads((made.folder / "gpt2" / "probe" / "smoothness_0000002-2-all-fixed.json").read_text())["all"]
    part = result(made, "gpt2")["all"]
    assert whole["smoothness_l2_standard_error"] == whole["smoothness_linf_low_standard_error"] == 0
    assert whole["smoothness_linf_low"] == whole["smoothness_linf_high"]
    half = 3 * part["smoothness_l2_standard_error"]
    assert part["smoothness_l2"] - half < whole["smoothness_l2"] < part["smoothness_l2"] + half
    low, high = part["smoothness_linf_low"], part["smoothness_linf_high"]
    assert low - 3 * part["smoothness_linf_low_standard_error"] < whole["smoothness_linf_low"]
    assert whole["smoothness_linf_high"] < high + 3 * part["smoothness_linf_high_standard_error"]


def quadratic(curvatures_nd, moved):
    """(change of each batch's gradient, true change) of f_i(θ) = ½ θᵀ diag(h_i) θ."""
    return curvatures_nd * moved, curvatures_nd.mean(0) * moved


def compared(changes_nd, base_nd, population=None):
    """The product's sums for gradients that change from `base_nd` to `base_nd + changes_nd`."""
    n, d = changes_nd.shape
    sketch, points = Whole(d), []
    for values in (base_nd + changes_nd, base_nd):
        grouped = GroupedBatches(sketch, n)
        for vector in values:
            grouped.add(vector.clone(), 1)
        points.append(grouped.sums())
    return difference_of(*points, sketch)


def test_a_sign_step_on_a_diagonal_quadratic_gives_the_constant_in_the_max_norm():
    """For H = diag(h), L∞ = max over sign vectors of ‖H s‖₁ = Σ h, reached by every sign step; L₂ = max h is not."""
    generator = torch.Generator().manual_seed(1)
    d, rate = 500, 1e-2
    h = torch.rand(d, generator=generator, dtype=torch.float64) + 0.1
    moved = rate * torch.sign(torch.randn(d, generator=generator, dtype=torch.float64))
    changes, truth = quadratic(h.expand(8, d), moved)
    groups = compared(changes, torch.randn(8, d, generator=generator, dtype=torch.float64))
    norms = norms_of(truth)
    low, _, high, _ = l1_bounds(groups, norms)
    assert low / rate == pytest.approx(float(h.sum()), rel=1e-9)
    assert high / rate == pytest.approx(float(h.sum()), rel=1e-9)
    noise = estimate_noise(groups, norms, batch_samples=1)
    measured = noise.grad_l2_corrected / float(moved.norm())
    assert measured == pytest.approx(float(h.norm()) / math.sqrt(d), rel=1e-9)
    assert measured < float(h.max())


@pytest.mark.parametrize(
    ("n", "population"),
    [(16, None), pytest.param(33, None, marks=pytest.mark.slow), pytest.param(40, 50, marks=pytest.mark.slow)],
)
def test_the_bounds_and_the_interval_hold_with_noise(n, population):
    """Batches with curvatures of their own: L₂'s interval covers the truth, the bounds on L∞ enclose it."""
    generator = torch.Generator().manual_seed(n)
    d, held, trials, lows, highs = 100, 0, 250, [], []
    for _ in range(trials):
        h = torch.rand(d, generator=generator, dtype=torch.float64)
        moved = torch.sign(torch.randn(d, generator=generator, dtype=torch.float64))
        own = h + 0.8 * torch.randn(population or n, d, generator=generator, dtype=torch.float64)
        truth = (h if population is None else own.mean(0)) * moved
        base = 3 * torch.randn(n, d, generator=generator, dtype=torch.float64)
        changes, _ = quadratic(own[:n], moved)
        groups, norms = compared(changes, base), norms_of(changes.mean(0))
        number = groups.prefixes[max(groups.prefixes)].num_batches  # kept groups of batches
        units = None if population is None else population / n * number
        noise = estimate_noise(groups, norms, batch_samples=1, population=units)
        half = t_quantile(noise.num_groups - 1) * noise.signal_standard_error
        held += abs(noise.signal_l2_squared - float(truth @ truth)) <= half
        low, low_error, high, high_error = l1_bounds(groups, norms, units)
        exact = float(truth.abs().sum())
        lows.append(low - exact)
        highs.append(high - exact)
        assert min(low_error, high_error) > 0
    assert 0.91 <= held / trials <= 0.985
    assert np.mean(lows) <= 2 * np.std(lows) / math.sqrt(trials)
    assert np.mean(highs) >= -2 * np.std(highs) / math.sqrt(trials)


def test_noise_common_to_both_points_cancels():
    """A base noise of 100 times the change must not be seen, which a difference of two norms would show."""
    generator = torch.Generator().manual_seed(3)
    changes = torch.ones(12, 50, dtype=torch.float64)
    groups = compared(changes, 100 * torch.randn(12, 50, generator=generator, dtype=torch.float64))
    noise = estimate_noise(groups, norms_of(changes.mean(0)), batch_samples=1)
    assert noise.noise_share == pytest.approx(0.0, abs=1e-9)
    assert noise.grad_l2_corrected == pytest.approx(math.sqrt(50))


def test_groups_of_other_batches_are_refused():
    sketch = Whole(3)
    points = []
    for count in (1, 2):
        grouped = GroupedBatches(sketch, 2)
        for _ in range(2):
            grouped.add(torch.ones(3), count)
        points.append(grouped.sums())
    with pytest.raises(ValueError, match="not of the same batches"):
        difference_of(*points, sketch)
