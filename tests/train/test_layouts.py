"""Every parallel layout computes the same losses, norms and weights as one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

# Layouts add fp32 numbers in different orders. One rounding is 2^-24 = 6e-8 relative; a loss or norm here results from
# some tens of them, of random sign. A wrongly scaled or reduced gradient is off by a factor.
ROUNDING = 2e-6
LR = {"lion": 1e-3, "sgd": 0.1, "adamw": 1e-3}
STEPS = 5
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP1 unsharded": (1, {"parallel__use_distributed_optimizer": False}),
    "DP2 unsharded": (2, {"parallel__use_distributed_optimizer": False}),
    "DP2 overlap": (2, OVERLAP),
    "TP2 sequence parallel": (2, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}),
    "DP1 bf16": (1, {"train__precision": "bf16"}),
    "DP2 bf16": (2, {"train__precision": "bf16"}),
    "DP2 bf16 unsharded": (2, {"train__precision": "bf16", "parallel__use_distributed_optimizer": False}),
    "DP2 bf16 overlap": (2, {"train__precision": "bf16", **OVERLAP}),
}
LATER = ("TP2", "PP2", "DP4", "DP2 unsharded", "DP2 bf16 unsharded")
"""Layouts of the slow tests; of the other optimizers all are slow."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def layouts_of(optimizer: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """The layouts that an optimizer runs at; AdamW is Megatron's own, so the variants leave it out."""
    return tiny.LAYOUTS if optimizer == "adamw" else {**tiny.LAYOUTS, **VARIANTS}


def pairs(layouts: Callable[[str], Any]) -> list[Any]:
    """(layout, optimizer) of each run that is compared with the one on a single process."""
    return [
        pytest.param(layout, optimizer, marks=pytest.mark.slow if is_later(layout, optimizer) else ())
        for optimizer in LR
        for layout in list(layouts(optimizer))[1:]
    ]


def is_later(layout: str, optimizer: str) -> bool:
    return layout in LATER or optimizer != "lion"


Runs = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """Returns the outcome of an optimizer's run in a layout. Runs that no chosen test needs are not made.

    Nothing is clipped: a norm near the threshold would hide or add differences.
    """
    corpus = tiny.write_corpus(folder / "corpus")

    @functools.cache
    def made(optimizer: str, later: bool) -> dict[str, dict[str, Any]]:
        jobs = {}
        for layout, (size, changes) in layouts_of(optimizer).items():
            if optimizer == "lion" and (layout in LATER) is not later:
                continue
            # A probe has more micro-batches than a step: overlapped reduction must not mix up the two counts.
            config = tiny.tiny_config(
                folder / f"{layout}-{optimizer}", corpus, train__steps=STEPS, optimizer__clip_grad=0.0,
                optimizer__name=optimizer, optimizer__lr=LR[optimizer], probe__every=3, probe__num_batches=2, **changes,
            )  # fmt: skip
            jobs[layout] = (size, config)
        return tiny.run_all(jobs)

    return lambda layout, optimizer: made(optimizer, is_later(layout, optimizer))[layout]


def relative(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("layout", "optimizer"), pairs(layouts_of))
def test_losses_and_gradient_norms(runs: Runs, layout: str, optimizer: str) -> None:
    reference = runs("DP1 bf16" if "bf16" in layout else "DP1", optimizer)
    found = runs(layout, optimizer)
    assert len(found["losses"]) == STEPS
    assert relative(found["losses"], reference["losses"]) < ROUNDING
    assert relative(found["norms"], reference["norms"]) < ROUNDING
    for probe, expected in zip(found["probes"], reference["probes"], strict=True):
        for key in ("probe/loss", "probe/grad_l1", "probe/grad_l2", "probe/kkt_residual"):
            assert probe[key] == pytest.approx(expected[key], rel=ROUNDING)
        assert probe["probe/num_parameters"] == expected["probe/num_parameters"]


@pytest.mark.parametrize(("layout", "optimizer"), pairs(lambda optimizer: tiny.LAYOUTS))
def test_weights(runs: Runs, folder: Path, layout: str, optimizer: str) -> None:
    for made in (layout, "DP1"):
        assert "failed" not in runs(made, optimizer)
    ours = tiny.read_weights(folder / f"{layout}-{optimizer}", STEPS)
    reference = tiny.read_weights(folder / f"DP1-{optimizer}", STEPS)
    assert ours.keys() == reference.keys()
    moved = total = 0
    for name, expected in reference.items():
        apart = (ours[name] - expected).abs()
        if optimizer == "sgd":
            assert apart.max() < 1e-6, name
            continue
        # If a gradient is zero except for rounding, its sign is random, and LION (like AdamW in its first steps) turns it
        # into a full step. The bias of the keys is such a parameter: softmax does not depend on it.
        assert apart.max() <= 2 * STEPS * LR[optimizer] * 1.001, name
        rest = apart if "linear_qkv.bias" not in name else apart[:0]
        moved, total = moved + int((rest > 1e-6).sum()), total + rest.numel()
    assert moved <= total * 1e-3


@pytest.mark.parametrize("optimizer", ["lion", pytest.param("sgd", marks=pytest.mark.slow)])
def test_bitwise_where_the_arithmetic_is_the_same(runs: Runs, optimizer: str) -> None:
    """Sharding at one process, and overlapping communication, change no operation."""
    for one, other in [("DP1", "DP1 unsharded"), ("DP2", "DP2 overlap"), ("DP2 bf16", "DP2 bf16 overlap")]:
        first, second = runs(one, optimizer), runs(other, optimizer)
        assert first["losses"] == second["losses"], (one, other)
        for key in ("state_fingerprint", "weights_fingerprint"):
            assert first["manifest"][key] == second["manifest"][key], (one, other, key)


def initial_weights(rank: int, configs: dict[str, Any]) -> dict[str, tuple[str, str]]:
    from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint

    found = {}
    for name, config in configs.items():
        with tiny.opened_run(config) as run:
            found[name] = weights_fingerprint(run.model), state_fingerprint(run.model, run.optimizer)
    return found


def test_initial_weights_are_bitwise_equal(folder: Path) -> None:
    corpus = tiny.write_corpus(folder / "corpus-initial")
    layouts = {**tiny.LAYOUTS, **{name: VARIANTS[name] for name in ("DP2 unsharded", "TP2 sequence parallel")}}
    for precision in ("fp32", "bf16"):
        jobs = {
            layout: (size, tiny.tiny_config(folder / "initial", corpus, train__precision=precision, **changes))
            for layout, (size, changes) in layouts.items()
        }
        found = tiny.run_all(jobs, initial_weights)
        assert len(found) == len(layouts)
        assert len(set(found.values())) == 1, found


def other_seed(rank: int, config: Any) -> str:
    from megatron_lion.train.fingerprint import weights_fingerprint

    with tiny.opened_run(config) as run:
        before = weights_fingerprint(run.model)
        next(run.model[0].parameters()).data.view(-1)[3] += 1e-7
        assert weights_fingerprint(run.model) != before, "one changed element must change the fingerprint"
        return before


def test_initial_weights_depend_on_the_seed(folder: Path) -> None:
    corpus = tiny.write_corpus(folder / "corpus-seed")
    one, two = (
        run_distributed(other_seed, 1, tiny.tiny_config(folder / "seed", corpus, seed=seed))[0] for seed in (1, 2)
    )
    assert one != two
