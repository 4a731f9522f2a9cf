"""Small runs with each kind of element-wise operations, for tests that compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_bert import tiny_bert, write_bert_corpus
from tiny_gpt2 import tiny_gpt2, write_text_corpus

TP2 = {"parallel__tensor_model_parallel_size": 2}
SEQUENCE = {**TP2, "parallel__sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": ("gpt2", 1, {}),
    "gpt2 bf16": ("gpt2", 1, {"train__precision": "bf16"}),
    "gpt2 fp16": ("gpt2", 1, {"train__precision": "fp16"}),
    "gpt2 erf": ("gpt2", 1, {"model__gelu": "erf"}),
    "gpt2 unfused attention": ("gpt2", 1, {"model__attention": "unfused"}),
    "gpt2 recompute": ("gpt2", 1, {"model__recompute": True}),
    "gpt2 TP2": ("gpt2", 2, TP2),
    "gpt2 sequence parallel": ("gpt2", 2, SEQUENCE),
    "gpt2 PP2": ("gpt2", 2, {"parallel__pipeline_model_parallel_size": 2}),
    "bert": ("bert", 1, {}),
    "bert bf16": ("bert", 1, {"train__precision": "bf16"}),
    "bert sequence parallel": ("bert", 2, {**SEQUENCE, "data__mask_probability": 0.18}),
}
QUICK = "gpt2 bf16"
"""The layout of the quick tests; the slow ones take the rest."""
DROPOUT: dict[str, dict[str, Any]] = {
    "dropout": {},
    "dropout again": {},
    "dropout recomputed": {"model__recompute": True},
    "dropout TP2": TP2,
    "dropout seed": {"seed": 5},
    "no dropout": {"model__hidden_dropout": 0.0},
}
LOGGED = ("train/loss", "train/mlm_loss", "train/sop_loss", "optim/grad_l2")


def run_jobs(folder: Path, layouts: list[str], dropout: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of metrics.jsonl, by name, of `layouts` with each kind of operations and of fused runs with dropout."""
    corpora = {"gpt2": write_text_corpus(folder / "corpus"), "bert": write_bert_corpus(folder / "bert")}
    build = {"gpt2": tiny_gpt2, "bert": tiny_bert}
    common: dict[str, Any] = {
        "train__steps": 2, "train__global_batch_size": 4, "train__micro_batch_size": 2, "optimizer__name": "sgd",
        "optimizer__lr": 0.1, "optimizer__clip_grad": 0.0,
    }  # fmt: skip
    jobs = {}
    for name in layouts:
        model, size, changes = LAYOUTS[name]
        for kind in ("megatron", "fused"):
            config = build[model](
                folder / f"{name} {kind}", corpora[model], **{**common, "model__elementwise": kind, **changes}
            )
            jobs[f"{name} {kind}"] = (size, config)
    fused = {"model__hidden_dropout": 0.1, "model__elementwise": "fused"}
    for name, changes in dropout.items():
        config = tiny_gpt2(folder / name, corpora["gpt2"], **{**common, **fused, **changes})
        jobs[name] = (changes.get("parallel__tensor_model_parallel_size", 1), config)
    failed = {name: result["failed"] for name, result in tiny.run_all(jobs).items() if "failed" in result}
    assert not failed, "\n".join(failed.values())
    return {name: tiny.read_metrics(folder / name) for name in jobs}


def assert_the_same(logged: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Asserts that the layout's two runs logged the same numbers up to rounding."""
    ours, theirs = (logged[f"{name} {kind}"] for kind in ("fused", "megatron"))
    # megatron-core rounds after each operation, the kernels once; 2^-24, 2^-9 or 2^-11 each time.
    tolerance = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 1e-3}[LAYOUTS[name][2].get("train__precision", "fp32")]
    assert_same_steps(ours, theirs, 2, LOGGED, tolerance)


def assert_same_steps(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int, keys: tuple[str, ...], tolerance: float
) -> None:
    """Asserts that the lines of `steps` steps have the same keys of `keys`, and the same numbers up to `tolerance`, relative."""
    lines, expected_lines = ([line for line in run if "train/loss" in line] for run in (ours, theirs))
    assert len(lines) == len(expected_lines) == steps
    for line, expected in zip(lines, expected_lines, strict=True):
        for key in keys:
            assert (key in line) is (key in expected)
            if key in line:
                assert line[key] == pytest.approx(expected[key], rel=tolerance), key


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Returns the training loss of each step."""
    return [line["train/loss"] for line in lines if "train/loss" in line]
