"""BERT: layouts equal one process, a resumed run equals the uninterrupted one, the probe counts parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_bert import SEQ_LENGTH, VOCAB, tiny_bert, write_bert_corpus

ROUNDING = 3e-6  # as in test_layouts.py; the loss has one more division, by the step's number of masked tokens
STEPS = 4
LR = {"lion": 1e-3, "sgd": 0.1}
SEQUENCE_PARALLEL = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
LAYOUTS = {
    **tiny.LAYOUTS,
    "TP2 sequence parallel": (2, SEQUENCE_PARALLEL),
    "DP2 large micro-batch": (2, {"train__micro_batch_size": 4}),
}
LOGGED = ("train/loss", "train/mlm_loss", "train/sop_loss", "train/mlm_accuracy", "train/sop_accuracy", "optim/grad_l2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return write_bert_corpus(folder / "corpus")


LATER = ("TP2", "PP2", "DP4", "TP2xDP2", "DP2 large micro-batch")
"""Layouts of the slow tests."""

Runs = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(folder: Path, corpus: str) -> Runs:
    """Returns the outcomes of an optimizer's runs by layout. What no chosen test needs does not run."""

    @functools.cache
    def of(optimizer: str, later: bool = False) -> dict[str, dict[str, Any]]:
        jobs = {}
        for layout, (size, changes) in LAYOUTS.items():
            if (layout in LATER) is not later:
                continue
            config = tiny_bert(
                folder / f"{layout}-{optimizer}", corpus, train__steps=STEPS, optimizer__clip_grad=0.0, train__test_every=2,
                optimizer__name=optimizer, optimizer__lr=LR[optimizer], probe__every=2, probe__num_batches=2, **changes,
            )  # fmt: skip
            jobs[layout] = (size, config)
        return tiny.run_all(jobs)

    return of


RESUMED = {
    "DP2 bf16": {"train__precision": "bf16"},
    "TP2 sequence parallel": SEQUENCE_PARALLEL,
    "PP2": {"parallel__pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def resumed(folder: Path, corpus: str) -> Callable[[str], list[dict[str, Any]]]:
    """Returns the outcomes of a layout's runs with dropout: whole, stopped after half, resumed."""

    def of(name: str) -> list[dict[str, Any]]:
        settings = {
            "train__steps": STEPS,
            "model__hidden_dropout": 0.1,
            "model__attention_dropout": 0.1,
            **RESUMED[name],
        }
        whole, halved = (tiny_bert(folder / f"{name}-{kind}", corpus, **settings) for kind in ("whole", "halved"))
        half = dataclasses.replace(halved, train=dataclasses.replace(halved.train, stop_after=STEPS // 2))
        found = tiny.run_all({"whole": (2, whole), "half": (2, half)})
        return [found["whole"], found["half"], tiny.run_all({"resumed": (2, halved)})["resumed"]]

    return of


def logged(folder: Path, layout: str, optimizer: str) -> list[dict[str, Any]]:
    return [line for line in tiny.read_metrics(folder / f"{layout}-{optimizer}") if "train/loss" in line]


@pytest.mark.parametrize("optimizer", ["lion", pytest.param("sgd", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in list(LAYOUTS)[1:]]
)
def test_layouts(runs: Runs, folder: Path, layout: str, optimizer: str) -> None:
    found, single = runs(optimizer, layout in LATER)[layout], runs(optimizer)["DP1"]
    assert "failed" not in found, found["failed"]
    ours, reference = logged(folder, layout, optimizer), logged(folder, "DP1", optimizer)
    assert len(ours) == STEPS
    for line, expected in zip(ours, reference, strict=True):
        for key in LOGGED:
            assert line[key] == pytest.approx(expected[key], rel=ROUNDING), key
    for probe, expected in zip(found["probes"], single["probes"], strict=True):
        for key in ("probe/loss", "probe/grad_l1", "probe/grad_l2", "probe/kkt_residual", "test/loss"):
            assert probe[key] == pytest.approx(expected[key], rel=ROUNDING), key
        assert probe["probe/num_parameters"] == expected["probe/num_parameters"]


def test_loss_is_that_of_masked_tokens_plus_that_of_order(runs: Runs, folder: Path) -> None:
    assert "DP2" in runs("lion")
    for line in logged(folder, "DP2", "lion"):
        assert line["train/loss"] == pytest.approx(line["train/mlm_loss"] + line["train/sop_loss"], rel=1e-12)
        assert 0 <= line["train/mlm_accuracy"] <= 1
        assert 0 <= line["train/sop_accuracy"] <= 1


def test_training_learns_the_words(folder: Path, corpus: str) -> None:
    tiny.train(tiny_bert(folder / "long", corpus, train__steps=40, optimizer__lr=3e-3, train__global_batch_size=16))
    lines = [line for line in tiny.read_metrics(folder / "long") if "train/mlm_loss" in line]
    assert lines[-1]["train/mlm_loss"] < lines[0]["train/mlm_loss"] - 0.3


def test_probe_counts_tied_embeddings_once(runs: Runs) -> None:
    hidden, rows = 32, 128  # the vocabulary's tokens, padded to a multiple of 64
    assert 64 < len(VOCAB) <= rows
    block = 12 * hidden * hidden + 13 * hidden
    embeddings = (rows + SEQ_LENGTH + 2) * hidden
    heads = (hidden * hidden + hidden) + 2 * hidden + rows + (hidden * hidden + hidden) + (2 * hidden + 2)
    for probe in runs("lion")["TP2xPP2"]["probes"]:
        assert probe["probe/num_parameters"] == embeddings + 2 * block + 2 * hidden + heads
        assert 1 <= probe["probe/norm_ratio"] <= probe["probe/sqrt_d"]
    assert len(runs("lion")["TP2xPP2"]["probes"]) == 3  # before the first step and after steps 2 and 4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "DP2 bf16" else pytest.mark.slow) for name in RESUMED]
)
def test_resumed_run_is_bitwise_the_undisturbed_one(resumed: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    whole, half, found = resumed(name)
    assert len(half["losses"]) == STEPS // 2
    assert found["losses"] == whole["losses"]
    assert found["norms"] == whole["norms"]
    for key in ("state_fingerprint", "weights_fingerprint", "consumed_samples"):
        assert found["manifest"][key] == whole["manifest"][key], key
