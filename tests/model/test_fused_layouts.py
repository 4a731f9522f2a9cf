"""Layers with the fused element-wise operations at every layout and precision; tests/model/test_fused_layer.py has the sharpest."""

from __future__ import annotations

from typing import Any

import pytest
from elementwise_runs import DROPOUT, LAYOUTS, QUICK, assert_the_same, losses, run_jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")]

OTHERS = [name for name in LAYOUTS if name != QUICK]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_jobs(tmp_path_factory.mktemp("layouts"), OTHERS, DROPOUT)


@pytest.mark.parametrize("name", OTHERS)
def test_training_is_the_same(logged: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert_the_same(logged, name)


def test_dropout_is_drawn_from_the_runs_random_numbers(logged: dict[str, list[dict[str, Any]]]) -> None:
    assert losses(logged["dropout"]) == losses(logged["dropout again"])
    assert losses(logged["dropout"]) == losses(logged["dropout recomputed"]), "recomputation drops the same elements"
    assert losses(logged["dropout"])[0] != losses(logged["dropout seed"])[0]


def test_tensor_parallel_ranks_drop_the_same_elements(logged: dict[str, list[dict[str, Any]]]) -> None:
    """Otherwise their residual streams differ, and the gradient norm, which counts replicated tensors once, is wrong."""
    assert losses(logged["dropout"]) != losses(logged["no dropout"])
    for one, two in zip(logged["dropout"], logged["dropout TP2"], strict=True):
        if "train/loss" in one:
            assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
            assert two["optim/grad_l2"] == pytest.approx(one["optim/grad_l2"], rel=1e-4)
