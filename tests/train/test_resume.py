"""A resumed run equals the undisturbed one bit for bit, and a checkpoint loads exactly at other layouts."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import fits, run_distributed, skip_unless_fits

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
STEPS, HALF = 6, 3
TP2 = {"parallel__tensor_model_parallel_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
UNSHARDED = {"parallel__use_distributed_optimizer": False}

# name: processes, precision, optimizer, layout of the checkpoint, other settings
CASES: dict[str, tuple[int, str, str, str, dict[str, Any]]] = {
    "DP1 fp32 lion": (1, "fp32", "lion", "fully_reshardable", {}),
    "DP1 bf16 adamw": (1, "bf16", "adamw", "dp_reshardable", {}),
    "DP1 bf16 unsharded sgd": (1, "bf16", "sgd", "fully_reshardable", UNSHARDED),
    "DP2 fp32 lion": (2, "fp32", "lion", "fully_reshardable", {}),
    "DP2 bf16 lion": (2, "bf16", "lion", "dp_reshardable", {}),
    "DP2 fp32 adamw": (2, "fp32", "adamw", "dp_reshardable", {}),
    "DP2 bf16 adamw": (2, "bf16", "adamw", "fully_reshardable", {}),
    "DP2 fp32 unsharded adamw": (2, "fp32", "adamw", "fully_reshardable", UNSHARDED),
    "DP2 bf16 overlap lion": (2, "bf16", "lion", "fully_reshardable", OVERLAP),
    "DP2 m0=g1 lion": (2, "fp32", "lion", "fully_reshardable", {"optimizer__init_exp_avg": "first_gradient"}),
    "PP2 bf16 lion": (2, "bf16", "lion", "dp_reshardable", PP2),
    "TP2 sequence parallel lion": (2, "bf16", "lion", "fully_reshardable", {**TP2, "parallel__sequence_parallel": True}),
    "TP2xDP2 fp32 sgd": (4, "fp32", "sgd", "dp_reshardable", TP2),
    "TP2xDP2 bf16 lion": (4, "bf16", "lion", "fully_reshardable", TP2),
    "TP2xDP2 fp32 adamw": (4, "fp32", "adamw", "fully_reshardable", TP2),
}  # fmt: skip
LATER = (
    "DP1 bf16 adamw", "DP1 bf16 unsharded sgd", "DP2 fp32 lion", "DP2 m0=g1 lion", "DP2 bf16 adamw",
    "DP2 fp32 unsharded adamw", "TP2xDP2 fp32 sgd", "TP2xDP2 bf16 lion",
    "TP2xDP2 fp32 adamw",
)  # fmt: skip
"""Cases of the slow tests."""

Outcomes = Callable[[bool], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    return tmp_path_factory.mktemp(f"resume-{device}")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def outcomes(folder: Path, corpus: str, device: str) -> Outcomes:
    """ "NAME/twin": the undisturbed run; "NAME/half": stopped after 3 of 6 steps; "NAME/resumed": the same, resumed.

    The argument chooses the cases of the slow tests. Cases that need more devices than the machine has have no entry.
    """

    @functools.cache
    def of(later: bool) -> dict[str, Any]:
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        for name, (size, precision, optimizer, layout, changes) in CASES.items():
            if (name in LATER) is not later or not fits(device, size):
                continue
            settings = {
                "device": device,
                "train__steps": STEPS, "train__precision": precision, "optimizer__name": optimizer,
                "optimizer__lr": 0.1 if optimizer == "sgd" else 1e-3, "checkpoint__layout": layout, **DROPOUT, **changes,
            }  # fmt: skip
            twin, halved = (
                tiny.tiny_config(folder / f"{name}-{kind}", corpus, **settings) for kind in ("twin", "halved")
            )
            first[f"{name}/twin"] = size, twin
            first[f"{name}/half"] = size, dataclasses.replace(
                halved, train=dataclasses.replace(halved.train, stop_after=HALF)
            )  # fmt: skip
            second[f"{name}/resumed"] = size, halved
        return {**tiny.run_all(first, device=device), **tiny.run_all(second, device=device)}

    return of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in CASES]
)
def test_resumed_run_is_bitwise_the_undisturbed_one(outcomes: Outcomes, device: str, name: str) -> None:
    skip_unless_fits(device, CASES[name][0])
    found = outcomes(name in LATER)
    twin, half, resumed = (found[f"{name}/{kind}"] for kind in ("twin", "half", "resumed"))
    assert half["manifest"]["step"] == HALF
    assert len(half["losses"]) == HALF
    assert half["losses"] == twin["losses"][:HALF]
    assert twin["manifest"]["step"] == resumed["manifest"]["step"] == STEPS
    assert resumed["losses"] == twin["losses"]
    assert resumed["norms"] == twin["norms"]
    for key in ("state_fingerprint", "weights_fingerprint", "consumed_samples", "optimizer_state"):
        assert resumed["manifest"][key] == twin["manifest"][key], key
    assert half["manifest"]["state_fingerprint"] != twin["manifest"]["state_fingerprint"]


def test_dropout_was_on(outcomes: Outcomes, folder: Path, corpus: str, device: str) -> None:
    without = tiny.tiny_config(folder / "without", corpus, device=device, train__steps=1)
    found = run_distributed(tiny.train_each, 1, {"": without}, device=device)[0][""]
    assert found["losses"][0] != outcomes(False)["DP1 fp32 lion/twin"]["losses"][0]


# Hidden size 36 leaves gradient buckets that Megatron pads at their ends.
PADDED = {"model__hidden_size": 36, "model__vocab_size": 100, "model__make_vocab_size_divisible_by": 4}
PAIRS = [
    ("DP1", "DP2"), ("DP1", "TP2"), ("DP1", "PP2"), ("DP1", "TP2xPP2"), ("DP2", "PP2"), ("TP2", "DP4"), ("PP2", "TP2"),
    ("TP2xPP2", "DP1"), ("TP2xPP2", "DP2"), ("TP2xPP2", "TP2"),
]  # fmt: skip


def padded_elements(run: Any) -> int:
    buckets = [bucket for buffer in run.optimizer.megatron.buffers for bucket in buffer.buckets]
    return sum(bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets)


def train_and_save(rank: int, jobs: dict[str, Any]) -> dict[str, int]:
    """Takes two steps and saves; returns the number of padding elements in this rank's buckets."""
    from megatron_lion.train.run import save_run

    padding = {}
    for name, config in jobs.items():
        with tiny.opened_run(config) as run:
            batches = run.train_batches()
            for _ in range(2):
                assert not tiny.step_once(run, batches).skipped
            save_run(run)
            padding[name] = padded_elements(run)
    return padding


def load_and_save(rank: int, jobs: dict[str, Any]) -> dict[str, bool]:
    """Loads a checkpoint of another layout and saves it unchanged in another folder."""
    from megatron_lion.runs.steps import open_checkpoint, step_folder
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    for source, config in jobs.values():
        with tiny.opened_run(config) as run:
            restore_run(run, open_checkpoint(step_folder(Path(source), 2)))
            save_run(run)
    return dict.fromkeys(jobs, True)


def layout_config(run_dir: Path, corpus: str, layout: str, **changes: Any) -> tuple[int, Any]:
    size, settings = tiny.LAYOUTS[layout]
    return size, tiny.tiny_config(run_dir, corpus, **{**settings, **changes})


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("lion", "bf16"), pytest.param("adamw", "fp32", marks=pytest.mark.slow)]
)
def test_reshard_changes_no_element(folder: Path, corpus: str, device: str, optimizer: str, precision: str) -> None:
    skip_unless_fits(device, 4)
    base = folder / f"reshard-{optimizer}"
    corpus = tiny.write_corpus(folder / f"corpus-{optimizer}", vocab_size=100)
    settings = {"device": device, "optimizer__name": optimizer, "train__precision": precision, **PADDED}
    pairs = PAIRS if optimizer == "lion" else PAIRS[3::3]
    sources = sorted({"DP2", *(source for source, _ in pairs)})
    padding = tiny.run_all({s: layout_config(base / s, corpus, s, **settings) for s in sources}, train_and_save, device)
    assert padding["DP2"] > 0, "the case is about padded buckets"
    jobs = {}
    for source, target in pairs:
        size, config = layout_config(base / f"{source} to {target}", corpus, target, **settings)
        jobs[f"{source} to {target}"] = size, (base / source, config)
    tiny.run_all(jobs, load_and_save, device)
    for source, target in pairs:
        before = tiny.read_weights(base / source, 2, prefix="")
        after = tiny.read_weights(base / f"{source} to {target}", 2, prefix="")
        assert before.keys() == after.keys()
        assert any(name.startswith("optimizer.") for name in before)
        for name, tensor in before.items():
            assert tiny.same_bits(tensor, after[name]), (source, target, name)


def test_dp_reshardable_goes_to_other_data_parallel_sizes_only(folder: Path, corpus: str, device: str) -> None:
    skip_unless_fits(device, 4)
    base = folder / "dp_reshardable"
    corpus = tiny.write_corpus(folder / "corpus-dp", vocab_size=100)
    settings = {
        "device": device, "checkpoint__layout": "dp_reshardable", "train__precision": "bf16", "train__steps": 4, **PADDED,
    }  # fmt: skip
    size, config = layout_config(base, corpus, "DP2", train__stop_after=2, **settings)
    run_distributed(tiny.train_each, size, {"": config}, device=device)
    jobs = {}
    for target in ("DP1", "DP4", "TP2", "PP2"):
        shutil.copytree(base, f"{base}-{target}")
        jobs[target] = layout_config(Path(f"{base}-{target}"), corpus, target, **settings)
    found = tiny.run_all(jobs, tiny.errors_of_each, device)
    assert found["DP1"] == found["DP4"] == ("", "")
    for target in ("TP2", "PP2"):
        kind, message = found[target]
        assert kind == "CheckpointError", message
        assert "a dp_reshardable checkpoint of TP 1 x PP 1" in message
        assert "fully_reshardable" in message
