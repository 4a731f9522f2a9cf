"""A run with probes equals the run without them bit for bit, also after an interrupted probe."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from distributed import fits, run_distributed, skip_unless_fits
from megatron.core.transformer.transformer_block import TransformerBlock
from tiny import error_of, opened_run, outcome, read_metrics, run_all, tiny_config, train, write_corpus

from megatron_lion.gradient.accumulate import set_dropout

SETTINGS = {
    "bf16": (1, {"train__precision": "bf16"}),
    "dropout in the probe": (1, {"probe__dropout": True}),
    "fresh samples": (1, {"probe__data": "fresh"}),
    "recompute": (1, {"model__recompute": True}),
    "overlapped": (2, {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}),
    "not sharded": (2, {"parallel__use_distributed_optimizer": False, "train__precision": "bf16"}),
    "moving": (2, {"probe__mode": "moving", "probe__num_batches": 1, "parallel__overlap_grad_reduce": True}),
    "TP2 SP": (2, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}),
    "PP2": (2, {"parallel__pipeline_model_parallel_size": 2}),
}
LATER = ("fresh samples", "recompute", "not sharded", "TP2 SP")
"""Cases of the slow tests."""
PROBE = ("probe__dropout", "probe__data", "probe__mode", "probe__num_batches")


def make_config(folder, corpus, **changes):
    return tiny_config(
        folder,
        corpus,
        **{
            "model__hidden_dropout": 0.1,
            "model__attention_dropout": 0.1,
            "train__steps": 3,
            "probe__num_batches": 3,
            "optimizer__clip_grad": 0.05,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=200)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, corpus, device):
    """Gives a case's run folders, without probes and with; the argument chooses the cases of the slow tests."""
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda later: made_pairs(folder, corpus, device, later))


def made_pairs(folder, corpus, device, later):
    """{case: (run folder without probes, run folder with)} of the cases that fit on the device."""
    jobs = {}
    for case, (size, changes) in SETTINGS.items():
        if (case in LATER) is not later or not fits(device, size):
            continue
        plain = {key: value for key, value in changes.items() if key not in PROBE}
        jobs[f"{case}/plain"] = (size, make_config(folder / case / "plain", corpus, device=device, **plain))
        probed = make_config(folder / case / "probed", corpus, device=device, **changes, probe__every=1)
        jobs[f"{case}/probed"] = (size, probed)
    run_all(jobs, device=device)
    return {case: (folder / case / "plain", folder / case / "probed") for case in SETTINGS}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in LATER else ()) for case in SETTINGS]
)
def test_run_with_probes_is_the_run_without(pairs, device, case):
    skip_unless_fits(device, SETTINGS[case][0])
    folders = pairs(case in LATER)[case]
    plain, probed = map(outcome, folders)
    assert plain["losses"] == probed["losses"]
    assert plain["norms"] == probed["norms"]
    for key in ("state_fingerprint", "weights_fingerprint", "consumed_samples", "optimizer_state"):
        assert plain["manifest"][key] == probed["manifest"][key], key
    for ours in folders[0].glob("checkpoints/step_0000003/rng_*"):
        theirs = folders[1] / "checkpoints" / "step_0000003" / ours.name
        assert ours.read_bytes() == theirs.read_bytes(), "the random states differ"
    steps = [line["step"] for line in probed["probes"]]
    assert steps == ([1, 2, 3] if case == "moving" else [0, 1, 2, 3])
    assert not plain["probes"]


def interrupt_and_resume(rank, config):
    """Work of one process: trains with SIGTERM during the probe of step 2, then runs the same command again."""
    from megatron_lion.gradient.accumulate import FullGradient

    untouched = FullGradient.add
    calls = []

    def add_and_signal(self, batches, *, stop=False):
        calls.append(self)
        if len(calls) == 7 and rank == 1:  # probes of steps 0 and 1 took three each; only one rank gets the signal
            os.kill(os.getpid(), signal.SIGTERM)
        return untouched(self, batches, stop=stop)

    FullGradient.add = add_and_signal
    first = error_of(train, config)
    between = (
        sorted(path.name for path in Path(config.run_dir, "probe").iterdir()),
        outcome(config.run_dir)["manifest"]["step"],
    )
    FullGradient.add = untouched
    return first, between, train(config)


def test_interrupted_probe_starts_over_and_training_goes_on_as_if_nothing_had_been(tmp_path, corpus, device):
    layout = {"device": device, "parallel__overlap_grad_reduce": True, "probe__every": 1}
    whole = run_distributed(train_two, 2, make_config(tmp_path / "whole", corpus, **layout), device=device)[0]
    first, (files, step), resumed = run_distributed(
        interrupt_and_resume, 2, make_config(tmp_path / "cut", corpus, **layout), device=device
    )[0]
    assert first[0] == "StoppedOnRequest"
    assert files == ["step_0000000.json", "step_0000001.json"], "nothing of the interrupted probe may be left"
    assert step == 2
    assert resumed["manifest"]["state_fingerprint"] == whole["manifest"]["state_fingerprint"]
    assert resumed["losses"] == whole["losses"]
    assert [line["step"] for line in resumed["probes"]] == [0, 1, 2, 3]
    for ours, theirs in zip(resumed["probes"], whole["probes"], strict=True):
        assert {**ours, "time": 0, "probe/seconds": 0} == {**theirs, "time": 0, "probe/seconds": 0}


def interrupt_at_start(rank, config):
    """Work of one process: trains with SIGTERM during the first probe, then runs the same command again."""
    from megatron_lion.gradient.accumulate import FullGradient

    untouched = FullGradient.add

    def add_and_signal(self, batches, *, stop=False):
        os.kill(os.getpid(), signal.SIGTERM)
        return untouched(self, batches, stop=stop)

    FullGradient.add = add_and_signal
    first = error_of(train, config)
    FullGradient.add = untouched
    left = list(Path(config.run_dir).glob("probe/*")), list(Path(config.run_dir).glob("checkpoints/step*"))
    return first, left, train(config)


def test_interrupted_first_probe_is_taken_again(tmp_path, corpus, device):
    config = make_config(tmp_path / "run", corpus, device=device, probe__every=3)
    first, left, again = run_distributed(interrupt_at_start, 1, config, device=device)[0]
    assert first[0] == "StoppedOnRequest"
    assert left == ([], [])
    assert [line["step"] for line in again["probes"]] == [0, 3]


def train_two(rank, config):
    return train(config)


def moving_and_gradients(rank, config):
    """Work of one process: trains with a moving probe, then collects the gradients of the same steps directly."""
    import torch
    from tiny import opened_run

    from megatron_lion.train.schedule import lr_at
    from megatron_lion.train.step import train_step

    train(config)
    taken = []
    with opened_run(dataclasses.replace(config, run_dir=config.run_dir + "-by-hand")) as run:

        def take():
            grads = [parameter.main_grad.detach().double().flatten() for parameter in run.model[0].parameters()]
            taken.append(torch.cat(grads))

        batches = run.train_batches()
        for step in range(config.train.steps):
            train_step(
                run.model,
                run.optimizer,
                batches,
                run.objective,
                config,
                run.ranks,
                lr_at(config, step + 1),
                on_gradient=take,
            )
    return taken


def test_moving_window_is_the_mean_of_the_unclipped_gradients_of_its_steps(tmp_path, corpus, device):
    config = make_config(
        tmp_path / "moving", corpus, device=device, train__steps=5, probe__every=5, probe__num_batches=3, probe__mode="moving",
        optimizer__clip_grad=1e-3,
    )  # fmt: skip
    taken = run_distributed(moving_and_gradients, 1, config, device=device)[0]
    mean = sum(taken[2:]) / 3
    (line,) = [line for line in read_metrics(config.run_dir) if "probe/grad_l1" in line]
    assert (line["step"], line["probe/num_batches"], line["probe/is_moving"]) == (5, 3, 1)
    assert line["probe/grad_l1"] == pytest.approx(float(mean.abs().sum()), rel=1e-6)
    assert line["probe/grad_l2"] == pytest.approx(float(mean.norm()), rel=1e-6)
    losses = outcome(config.run_dir)["losses"]
    assert line["probe/loss"] == pytest.approx(sum(losses[2:]) / 3, rel=1e-12)


def test_a_probe_without_dropout_keeps_recomputing_activations(tmp_path, corpus):
    """A model that fits only with recomputation must fit during the probe, too."""
    with opened_run(tiny_config(tmp_path / "run", corpus, model__hidden_dropout=0.1)) as run:
        for on in (False, True):
            set_dropout(run.model[0], on=on)
            training = {type(module): module.training for module in run.model[0].modules()}
            assert training[TransformerBlock]
            assert training[torch.nn.Dropout] == on
