"""`megatron-lion probe` on checkpoints: other layouts, no optimizer state, interruption, repetition."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from distributed import run_distributed
from jsonargparse import ArgumentParser
from test_full_gradient import assert_close
from tiny import error_of, read_metrics, tiny_config, train, write_corpus

from megatron_lion.commands import probe as verb


def probe_command(*words):
    """Runs the subcommand in this process and returns its stdout."""
    parser = ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        verb.run(parser.parse_args(list(map(str, words))))
    return out.getvalue()


def work(rank, config):
    """Work of one process: a run with probes at 0, 2, 4 and checkpoints at 2, 4."""
    train(config)


def commands(rank, jobs):
    """Work of one process: runs the subcommand with each list of arguments; returns its output or its error."""
    found = {}
    for name, words in jobs.items():
        printed = []
        error = error_of(lambda words=words, printed=printed: printed.append(probe_command(*words)))
        found[name] = (printed[0] if printed else "", error)
    return found


def copy_of(run, target, *, keep_probes=True):
    shutil.copytree(run, target)
    if not keep_probes:
        shutil.rmtree(target / "probe")
        lines = [line for line in (target / "metrics.jsonl").read_text().splitlines() if "probe/" not in line]
        (target / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return target


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus", documents=200)
    config = tiny_config(
        folder / "run", corpus, train__steps=4, checkpoint__every=2, probe__every=2, probe__num_batches=4,
        model__hidden_dropout=0.1, train__precision="bf16", optimizer__weight_decay=0.1,
    )  # fmt: skip
    run_distributed(work, 1, config)
    return folder / "run"


def result(run, name):
    found = json.loads((run / "probe" / name).read_text())
    del found["sha256"]  # it covers the time that the probe took
    return found


def test_same_layout_gives_the_probe_of_training_bit_for_bit(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run", keep_probes=False)
    printed, error = run_distributed(commands, 1, {"all": [run]})[0]["all"]
    assert not error[0], error
    for step in (2, 4):
        ours, theirs = result(run, f"step_000000{step}.json"), result(trained, f"step_000000{step}.json")
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
        assert f"│ {step:>4} │" in printed
    lines = [line for line in read_metrics(run) if "probe/grad_l1" in line]
    theirs = [line for line in read_metrics(trained) if "probe/grad_l1" in line and line["step"]]
    assert [{**line, "time": 0, "probe/seconds": 0} for line in lines] == [
        {**line, "time": 0, "probe/seconds": 0} for line in theirs
    ]


def test_other_layouts_agree(trained, tmp_path):
    folders = {name: copy_of(trained, tmp_path / name, keep_probes=False) for name in ("TP2", "PP2", "DP2")}
    flags = {
        "TP2": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
        "PP2": ["--pipeline-model-parallel-size", 2],
        "DP2": ["--micro-batch-size", 2],
    }
    jobs = {name: [folder, "--steps", "latest", *flags[name]] for name, folder in folders.items()}
    found = run_distributed(commands, 2, jobs)[0]
    theirs = result(trained, "step_0000004.json")
    for name, (_, error) in found.items():
        assert not error[0], error
        ours = result(folders[name], "step_0000004.json")
        assert ours["theta"] == "master weights"
        assert not (folders[name] / "probe" / "step_0000002.json").exists(), "only the latest was asked for"
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # bf16: another order of sums
        assert_close(ours["all"], theirs["all"], name, relative=0.02)
        assert ours["all"]["theta_linf"] == theirs["all"]["theta_linf"]


def test_what_is_there_is_not_computed_again_and_other_settings_get_their_own_file(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    stamp = (run / "probe" / "step_0000002.json").stat().st_mtime_ns
    older = copy_of(trained, tmp_path / "older")
    content = {k: v for k, v in result(older, "step_0000002.json").items() if k not in ("sha256", "population_samples")}
    (older / "probe" / "step_0000002.json").write_text(json.dumps(content))
    jobs = {
        "of an earlier version": [older, "--steps", "2"],
        "there": [run, "--figures"],
        "more": [run, "--steps", "2", "--num-batches", 8],
        "more again": [run, "--steps", "2", "--num-batches", 8],
        "test": [run, "--steps", "2", "--num-batches", 2, "--data", "test"],
        "dropout": [run, "--steps", "2", "--dropout"],
        "again": [run, "--steps", "4", "--again"],
    }
    found = run_distributed(commands, 1, jobs)[0]
    assert not any(error[0] for _, error in found.values()), found
    assert found["there"][0].count("(found)") == 2
    assert "(found)" not in found["of an earlier version"][0], "its noise figures had no errors"
    assert result(older, "step_0000002.json")["population_samples"] > 0, "the step's own file is written again"
    assert (run / "probe" / "step_0000002.json").stat().st_mtime_ns == stamp
    more = result(run, "step_0000002-8-fixed.json")
    assert more["num_batches"] == 8
    assert more["ladder"][2]["grad_l2"] == pytest.approx(result(run, "step_0000002.json")["all"]["grad_l2"], rel=1e-6)
    assert found["more again"][0].count("(found)") == 1
    assert result(run, "step_0000002-2-test.json")["data"] == "test"
    assert result(run, "step_0000002-4-fixed-dropout.json")["dropout"] is True
    assert "(found)" not in found["again"][0]
    lines = (run / "metrics.jsonl").read_bytes()
    assert lines.startswith(before)
    assert len(lines[len(before) :].splitlines()) == 1, "only the step that was done again has a new line"
    for name in ("probe_ratio.png", "probe_ladder.png", "probe_layers.png"):
        content = (run / "figures" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_runs_are_drawn_together(trained, tmp_path):
    run, other, larger = (copy_of(trained, tmp_path / name) for name in ("run", "other", "larger"))
    path = larger / "probe" / "step_0000004.json"
    content = json.loads(path.read_text().replace('"num_parameters": ', '"num_parameters": 1'))
    del content["sha256"]  # as a user who changed the file must
    path.write_text(json.dumps(content))
    jobs = {"both": [run, "--figures", "--beside", other], "sizes": [run, "--figures", "--beside", larger]}
    found = run_distributed(commands, 1, jobs)[0]
    assert not found["both"][1][0], found["both"]
    assert {path.name for path in (run / "figures").iterdir()} == {
        "probe_ratio.png", "probe_ladder.png", "probe_layers.png", "probe_layers_other.png",
    }  # fmt: skip
    assert found["sizes"][1][0] == "DataError"
    assert "one figure shows one size" in found["sizes"][1][1]


def strip_and_probe(rank, config):
    """Work of one process: saves a checkpoint of the weights alone, as another tool may do, and probes it."""
    from tiny import opened_run

    from megatron_lion.runs import steps
    from megatron_lion.train import checkpoint as ckpt
    from megatron_lion.train.model_state import model_sharded_state
    from megatron_lion.train.restore import restore_run

    run_dir = Path(config.run_dir)
    with opened_run(config) as run:
        restore_run(run, steps.open_checkpoint(steps.step_folder(run_dir, 4)))
        manifest = steps.open_checkpoint(steps.step_folder(run_dir, 4)).manifest
        facts = {key: manifest[key] for key in ("model", "data_digest", "tokenizer_sha256", "weights_fingerprint")}
        facts["layout"] = ckpt.layout_facts(run.ranks)
        shutil.rmtree(steps.step_folder(run_dir, 4))
        ckpt.save_checkpoint(run_dir, 4, {"model": model_sharded_state(run.model)}, {}, facts, run.ranks)
    return commands(rank, {"weights": [run_dir, "--steps", "4"]})["weights"]


def test_checkpoint_without_optimizer_state_still_gives_norms(trained, tmp_path):
    from megatron_lion.configfile import load_config

    run = copy_of(trained, tmp_path / "run", keep_probes=False)
    config = load_config(run / "config.yaml")
    import dataclasses

    _, error = run_distributed(strip_and_probe, 1, dataclasses.replace(config, run_dir=str(run)))[0]
    assert not error[0], error
    ours, theirs = result(run, "step_0000004.json"), result(trained, "step_0000004.json")
    assert ours["theta"] == "the model's own weights"
    assert theirs["theta"] == "master weights"
    for key in ("grad_l1", "grad_l2", "grad_linf", "norm_ratio"):
        assert ours["all"][key] == theirs["all"][key], "the gradient does not depend on the masters"
    assert ours["all"]["kkt_residual"] == pytest.approx(theirs["all"]["kkt_residual"], rel=1e-3)
    assert ours["all"]["theta_linf"] == pytest.approx(theirs["all"]["theta_linf"], rel=2**-8)


def interrupted(rank, run):
    """Work of one process: SIGTERM in the middle of the probe of step 4, then the same command again."""
    from megatron_lion.gradient.accumulate import FullGradient

    untouched, calls = FullGradient.add, []

    def add_and_signal(self, batches, *, stop=False):
        calls.append(self)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return untouched(self, batches, stop=stop)

    FullGradient.add = add_and_signal
    _, error = commands(rank, {"cut": [run]})["cut"]
    FullGradient.add = untouched
    left = sorted(path.name for path in Path(run, "probe").iterdir())
    return error, left, commands(rank, {"whole": [run]})["whole"]


def test_interrupted_command_keeps_finished_steps_and_starts_the_other_over(trained, tmp_path):
    run = copy_of(trained, tmp_path / "run", keep_probes=False)
    error, left, (printed, second) = run_distributed(interrupted, 1, run)[0]
    assert error[0] == "StoppedOnRequest"
    assert left == ["step_0000002.json"]
    assert not second[0], second
    assert printed.count("(found)") == 1
    assert {**result(run, "step_0000004.json"), "seconds": 0} == {**result(trained, "step_0000004.json"), "seconds": 0}


def test_bad_input_is_refused_in_one_line(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    jobs = {
        "no run": [tmp_path / "empty"],
        "no step": [trained, "--steps", "3"],
        "no number": [trained, "--steps", "two"],
        "too many": [trained, "--num-batches", 100000],
        "layout": [trained, "--tensor-model-parallel-size", 2],
        "micro": [trained, "--micro-batch-size", 3],
    }
    found = {name: error for name, (_, error) in run_distributed(commands, 1, jobs)[0].items()}
    assert found["no run"][0] == "CheckpointError"
    assert "not a run folder" in found["no run"][1]
    assert found["no step"][0] == "CheckpointError"
    assert "there are: 2, 4" in found["no step"][1]
    assert found["too many"][0] == "ConfigError"
    assert "at most" in found["too many"][1]
    assert found["layout"][0] == found["micro"][0] == "ConfigError"
    assert found["no number"] == ("ConfigError", "--steps two: give all, latest, or steps such as 10000,20000")
