"""Runs with the fused loss, in Triton's interpreter, equal runs with megatron-core's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed
from elementwise_runs import assert_same_steps
from tiny_bert import tiny_bert, write_bert_corpus
from tiny_gpt2 import tiny_gpt2, write_text_corpus

from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config, save_config
from megatron_lion.model.sizes import memory_bytes
from megatron_lion.runs.folder import differences

TP2 = {"parallel__tensor_model_parallel_size": 2}
SEQUENCE = {**TP2, "parallel__sequence_parallel": True}
FP16 = {"train__precision": "fp16"}
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": ("gpt2", 1, {}),
    "gpt2 bf16": ("gpt2", 1, {"train__precision": "bf16"}),
    "gpt2 fp16": ("gpt2", 1, FP16),
    "gpt2 TP2": ("gpt2", 2, TP2),
    "bert": ("bert", 1, {}),
    "bert bf16": ("bert", 1, {"train__precision": "bf16"}),
    # At most 5 masked tokens a sample, which are computed as 6: one half on each rank.
    "bert sequence parallel": ("bert", 2, {**SEQUENCE, "data__mask_probability": 0.18}),
}
LOGGED = ("train/loss", "train/mlm_loss", "train/sop_loss", "train/mlm_accuracy", "optim/grad_l2", "test/loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fused")


@pytest.fixture(scope="module")
def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl of each run with each loss."""
    corpora = {"gpt2": write_text_corpus(folder / "corpus"), "bert": write_bert_corpus(folder / "bert")}
    build = {"gpt2": tiny_gpt2, "bert": tiny_bert}
    jobs = {
        f"{name} {loss}": (
            size,
            build[kind](
                folder / f"{name} {loss}", corpora[kind], model__loss=loss, train__steps=3, train__global_batch_size=4,
                train__micro_batch_size=2, train__test_every=3, train__test_batches=1, optimizer__name="sgd", optimizer__lr=0.1,
                optimizer__clip_grad=0.0, **changes,
            ),
        )
        for name, (kind, size, changes) in RUNS.items()
        for loss in ("megatron", "fused")
    }  # fmt: skip
    failed = {name: result["failed"] for name, result in tiny.run_all(jobs).items() if "failed" in result}
    assert not failed, "\n".join(failed.values())
    return {name: tiny.read_metrics(folder / name) for name in jobs}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_training_is_the_same(logged: dict[str, list[dict[str, Any]]], name: str) -> None:
    ours, theirs = (logged[f"{name} {loss}"] for loss in ("fused", "megatron"))
    # Gradients differ in their last bits, 2^-24, 2^-9 or 2^-11; the weights of 16-bit runs are then other roundings.
    tolerance = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 5e-4}[RUNS[name][2].get("train__precision", "fp32")]
    assert_same_steps(ours, theirs, 3, LOGGED, tolerance)


def opened(rank: int, run_dir: Path) -> str:
    """Loads the run's last step on a machine without Triton."""
    from unittest.mock import patch

    from megatron_lion.evaluate.open_run import open_run
    from megatron_lion.model import kernel_choice

    with patch.object(kernel_choice, "why_no_triton", lambda: "none here"), open_run(run_dir, device="cpu") as run:
        run.load(3)
        return run.config.model.loss


@pytest.mark.slow
@pytest.mark.usefixtures("logged")
def test_a_run_with_the_fused_loss_opens_without_triton(folder: Path) -> None:
    assert run_distributed(opened, 1, folder / "gpt2 fused") == ["fused"]


@pytest.mark.slow
def test_the_losses_are_computed_apart(logged: dict[str, list[dict[str, Any]]]) -> None:
    """Last bits differ, so the setting has an effect; three losses of one run may have equal bits on some processors."""
    values = [
        [line[key] for name in RUNS for line in logged[f"{name} {loss}"] for key in LOGGED if key in line]
        for loss in ("fused", "megatron")
    ]
    assert len(values[0]) > 10
    assert values[0] != values[1]


def test_the_estimate_of_memory_counts_logits_once() -> None:
    def logits(**changes: Any) -> int:
        config = tiny.tiny_config("unused", "unused", **{"train__precision": "bf16", **changes})
        without = tiny.tiny_config("unused", "unused", **{"train__precision": "bf16", **changes}, model__vocab_size=64)
        # 64 of 128 rows fewer, times 16 tokens
        return (memory_bytes(config, 1)["activations"] - memory_bytes(without, 1)["activations"]) // (64 * 16)

    assert (
        logits(device="cpu")
        == logits(device="cpu", model__loss="megatron")
        == logits(device="cuda", model__loss="megatron")
        == 6
    )
    assert logits(device="auto") == logits(device="cuda") == logits(device="cpu", model__loss="fused") == 2
    assert logits(device="cuda", train__precision="fp32") == 4


def test_settings_of_an_earlier_version_are_auto(folder: Path) -> None:
    path = folder / "config.yaml"
    save_config(RunConfig().resolved(), path)
    lines = path.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.strip().startswith("loss:")]
    assert len(older) == len(lines) - 1
    path.write_text("".join(older))
    assert differences(load_config(path), RunConfig()) == []
