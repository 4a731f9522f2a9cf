"""No checkpoint holds a NaN or an infinity, or a state that gives only such gradients; the message names what is damaged."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

CULPRIT = "decoder.layers.1.mlp.linear_fc2.weight"
NAN, INF = float("nan"), float("inf")
BF16 = {"train__precision": "bf16"}
FUSED = {**BF16, "optimizer__master_weights": "split32", "optimizer__momentum_dtype": "int8"}
# Processes, optimizer, settings, tensor and value of each fault.
# The fault happens before step 3. A damaged momentum damages the weights in step 3, which is found when that step is
# saved, or in step 4, whose gradients are not finite. A damaged weight is found in step 3.
FAULTS: dict[str, tuple[int, str, dict[str, Any], str, float]] = {
    "lion": (1, "lion", {}, "exp_avg", NAN),
    "lion, two processes": (2, "lion", {}, "exp_avg", NAN),
    "lion, inf": (1, "lion", {}, "exp_avg", -INF),
    "lion, int8": (1, "lion", FUSED, "exp_avg", INF),
    "lion, saved every second step": (1, "lion", {"checkpoint__every": 2}, "exp_avg", NAN),
    "lion, master": (1, "lion", FUSED, "param", INF),
    "lion, master, unsharded": (1, "lion", {**BF16, "parallel__use_distributed_optimizer": False}, "param", NAN),
    "lion, own weight": (2, "lion", {**BF16, "optimizer__master_weights": "shards"}, "weight", NAN),
    "sgd": (1, "sgd", {}, "momentum_buffer", NAN),
    "sgd, inf": (1, "sgd", {}, "momentum_buffer", INF),
    "adamw": (1, "adamw", {}, "exp_avg", NAN),
    # Its update is 0 from then on: no later gradient shows it.
    "adamw, second moment": (1, "adamw", {}, "exp_avg_sq", INF),
}
SLOW = {
    "lion, two processes", "lion, inf", "lion, saved every second step", "lion, master", "lion, master, unsharded", "sgd, inf", "adamw",
    "lion 3e38", "sgd 1e30", "adamw 1e30",
}  # fmt: skip
"""Faults and divergences of the slow suite."""
WORDS = {
    "exp_avg": "momentum exp_avg",
    "momentum_buffer": "momentum_buffer",
    "exp_avg_sq": "second moment exp_avg_sq",
    "param": "master weight",
    "weight": "weight",
}


def damage(run: Any, key: str, value: float) -> None:
    """Writes `value` into element 7 of the culprit's tensor, in the form in which the optimizer keeps it."""
    from megatron_lion.optim.parameter_shards import local_shards, named_global_parameters

    if key == "weight":
        if run.ranks.is_main:
            dict(named_global_parameters(run.model[0]))[CULPRIT].data.view(-1)[7] = value
        return
    for shard in local_shards(run.model, run.optimizer):
        if shard.name == CULPRIT and shard.start <= 7 < shard.start + shard.main.numel():
            flat = {"param": shard.main, **shard.state}[key]
            flat[7 - shard.start] = value  # shares memory with the optimizer, except for packed forms
            if hasattr(run.optimizer.inner, "layout") and not run.optimizer.inner.layout.is_plain:
                tensors = run.optimizer.megatron._get_main_param_and_optimizer_states(shard.parameter)
                tensors[key].view(-1)[7 - shard.start] = value
                run.optimizer.megatron._set_main_param_and_optimizer_states(shard.parameter, tensors)


def run_with_fault(rank: int, jobs: dict[str, tuple[Any, str, float]]) -> dict[str, tuple[str, str]]:
    """Runs `pretrain` with each config; before step 3 a memory fault damages a tensor."""
    from megatron_lion.train import loop

    build, take_step = loop.build_run, loop.train_step
    held: dict[str, Any] = {}

    def remember(*args: Any, **kwargs: Any) -> Any:
        held["run"] = build(*args, **kwargs)
        return held["run"]

    def step(*args: Any, **kwargs: Any) -> Any:
        if held["run"].step == 2:
            damage(held["run"], held["key"], held["value"])
        return take_step(*args, **kwargs)

    loop.build_run, loop.train_step = remember, step
    results = {}
    try:
        for name, (config, key, value) in jobs.items():
            held.update(key=key, value=value)
            results[name] = tiny.error_of(tiny.train, config)
    finally:
        loop.build_run, loop.train_step = build, take_step
    return results


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def saved(config: Any) -> list[int]:
    return sorted(
        int(path.parent.name[5:]) for path in Path(config.run_dir, "checkpoints").glob("step_*/manifest.json")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dead")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


def config_of(folder: Path, corpus: str, name: str) -> Any:
    _, optimizer, settings, _, _ = FAULTS[name]
    settings = {"checkpoint__every": 1, "checkpoint__keep": 1, "train__steps": 5, **settings}
    return tiny.tiny_config(folder / name, corpus, optimizer__name=optimizer, **settings)


@pytest.fixture(scope="module")
def damaged(folder: Path, corpus: str) -> Callable[[str], list[tuple[str, str]]]:
    """Function from a fault to kind and message of the error on each rank; slow faults run only if one is asked for."""
    found: dict[str, list[tuple[str, str]]] = {}

    def results_of(wanted: str) -> list[tuple[str, str]]:
        for size in (1, 2) if wanted not in found else ():
            jobs = {
                name: (config_of(folder, corpus, name), key, value)
                for name, (count, _, _, key, value) in FAULTS.items()
                if count == size and (name in SLOW) == (wanted in SLOW)
            }
            for results in run_distributed(run_with_fault, size, jobs):
                for name, error in results.items():
                    found.setdefault(name, []).append(error)
        return found[wanted]

    return results_of


@pytest.mark.parametrize("name", marked(FAULTS))
def test_a_damaged_state_ends_the_run_is_named_and_is_not_saved(
    folder: Path, corpus: str, damaged: Callable[[str], list[tuple[str, str]]], name: str
) -> None:
    key, config = FAULTS[name][3], config_of(folder, corpus, name)
    for kind, message in damaged(name):
        assert kind == "NumericsError", message
        assert re.match(r"step [34]: the training state is damaged: ", message)
        assert f"damaged: the {WORDS[key]} of {CULPRIT}[" in message
        assert message.endswith("The newest checkpoint is that of step 2: the same command resumes there")
    assert saved(config) == [2], "retention keeps the last good one"
    assert all(bool(tensor.isfinite().all()) for tensor in tiny.read_weights(config.run_dir, 2, prefix="").values())


def test_the_same_command_then_ends_as_if_nothing_had_happened(
    folder: Path, corpus: str, damaged: Callable[[str], list[tuple[str, str]]]
) -> None:
    from megatron_lion.runs.record import read_run

    config = config_of(folder, corpus, "lion")
    assert damaged("lion")
    assert read_run(config.run_dir).diverged
    twin = dataclasses.replace(config, run_dir=str(folder / "twin"))
    results = run_distributed(tiny.train_each, 1, {"again": config, "twin": twin})[0]
    assert results["again"]["manifest"]["step"] == 5
    fingerprints = [results[name]["manifest"]["state_fingerprint"] for name in ("again", "twin")]
    assert fingerprints[0] == fingerprints[1]
    record = read_run(config.run_dir)
    assert record.finished
    assert not record.diverged


def saves_and_restores(rank: int, config: Any) -> dict[str, tuple[str, str]]:
    """Errors of: saving a damaged state at once; resuming from a checkpoint that an earlier version saved with it."""
    import torch

    from megatron_lion.errors import NumericsError
    from megatron_lion.train import fingerprint
    from megatron_lion.train import run as run_module
    from megatron_lion.train.restore import restore_run

    found = {}
    with tiny.opened_run(config) as run:
        batches = run.train_batches()
        tiny.step_once(run, batches)
        damage(run, "exp_avg", NAN)
        found["save"] = tiny.error_of(run_module.save_run, run)
        found["saved"] = ("", str(saved(config)))
        checked = fingerprint.bit_sum
        # The sums without the counts of elements that are not finite.
        fingerprint.bit_sum = lambda *args, **options: checked(*args, **options) * torch.tensor([1, 0])
        try:
            checkpoint = run_module.save_run(run)
        except NumericsError:
            raise AssertionError("the switched-off check must not act") from None
        finally:
            fingerprint.bit_sum = checked
        found["restore"] = tiny.error_of(restore_run, run, checkpoint)
    return found


def test_neither_a_save_nor_a_resume_accepts_a_state_that_is_not_finite(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "direct", corpus)
    for found in run_distributed(saves_and_restores, 2, config):
        assert found["save"] == (
            "NumericsError",
            f"the momentum exp_avg of {CULPRIT}[7] on rank {found['save'][1].rsplit('rank ')[1][0]} is NaN or infinite",
        )
        assert found["saved"][1] == "[]", "nothing was written"
        kind, message = found["restore"]
        assert kind == "CheckpointError"
        assert "step_0000001: the momentum exp_avg" in message
        assert "move this step's folder away" in message


# lr by setting; the steps that are saved with it, or None if they depend on how the CPU's matrix products round.
DIVERGENCE: dict[str, tuple[str, float, dict[str, Any], list[int] | None]] = {
    "lion 1e3": ("lion", 1e3, {}, None),
    "lion 3e38": ("lion", 3e38, {}, []),
    "lion split24 int8 1e30": ("lion", 1e30, {**FUSED, "optimizer__master_weights": "split24"}, []),
    "sgd 10, no clipping": ("sgd", 10.0, {"optimizer__clip_grad": 0.0}, None),
    "sgd 1e30": ("sgd", 1e30, {}, []),
    "adamw 1e30": ("adamw", 1e30, BF16, []),
}


def diverge(rank: int, configs: dict[str, Any]) -> dict[str, tuple[str, str, Any]]:
    """The error of each run, and whether a step at a small rate from its newest checkpoint is taken."""
    from megatron_lion.train.restore import restore_run

    logging.disable(logging.CRITICAL)
    found = {}
    for name, config in configs.items():
        kind, message = tiny.error_of(tiny.train, config)
        usable = None
        if saved(config):
            small = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-4))
            with tiny.opened_run(small) as run:
                restore_run(run, tiny.newest_checkpoint(config.run_dir))
                usable = not tiny.step_once(run, run.train_batches()).skipped
        found[name] = kind, message, usable
    return found


@pytest.fixture(scope="module")
def diverged(folder: Path, corpus: str) -> Callable[[str], tuple[str, str, Any]]:
    """Function from a setting to what `diverge` found; the slow ones run only if one is asked for."""
    found: dict[str, tuple[str, str, Any]] = {}

    def results_of(wanted: str) -> tuple[str, str, Any]:
        if wanted not in found:
            configs = {
                name: tiny.tiny_config(
                    folder / name, corpus, optimizer__name=optimizer, optimizer__lr=lr, train__steps=8,
                    schedule__kind="constant", checkpoint__every=1, checkpoint__keep=1, **settings,
                )
                for name, (optimizer, lr, settings, _) in DIVERGENCE.items()
                if (name in SLOW) == (wanted in SLOW)
            }  # fmt: skip
            found.update(run_distributed(diverge, 1, configs)[0])
        return found[wanted]

    return results_of


@pytest.mark.parametrize("name", marked(DIVERGENCE))
def test_divergence_ends_with_a_newest_checkpoint_that_can_be_trained_from(
    folder: Path, corpus: str, diverged: Callable[[str], tuple[str, str, Any]], name: str
) -> None:
    kind, message, usable = diverged(name)
    assert kind == "NumericsError", message
    steps, expected = saved(tiny.tiny_config(folder / name, corpus)), DIVERGENCE[name][3]
    assert steps == expected or (expected is None and len(steps) <= 1), "checkpoint.keep is 1"
    assert "lower optimizer.lr" in message
    last = steps[-1] if steps else 0
    assert f"step {last + 1} was too large: after it, even the gradient of its own samples was not finite" in message
    if steps:
        assert usable, "the newest checkpoint gives a finite gradient"
        assert message.endswith(f"The newest checkpoint is that of step {last}: the same command resumes there")
    else:
        assert message.endswith("There is no checkpoint: the same command starts at step 0")
