"""The benchmark of whole training steps runs on one and two processes and writes its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import run_distributed

REPO = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--device", "cpu", "--steps", "2", "--warmup", "1", "--micro-batch-size", "1", "--num-microbatches", "1",
             "--profile", "1"]  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "model", "optimizers"),
    [
        pytest.param(
            1, "gpt2-tiny", ["sgd fp32 shards + copy", "plain PyTorch loop, adamw", "transformers loop, adamw"], id="one process"
        ),
        pytest.param(1, "bert-tiny", ["sgd fp32 shards + copy"], id="BERT", marks=pytest.mark.slow),
        pytest.param(
            2, "gpt2-tiny", ["lion split24, int8 momentum", "adamw fp32 shards + copy"], id="two processes",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_table_of_a_small_run(processes, model, optimizers, tmp_path):
    output = tmp_path / "results" / "train_step"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(REPO / "benchmarks" / "train_step.py"), "--models", model, "--optimizers", ";".join(optimizers)]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *ARGUMENTS, "--output", str(output)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = json.loads(output.with_suffix(".json").read_text())
    assert [row["optimizer"] for row in written["rows"]] == optimizers
    assert {"date", "device", "commit", "versions"} <= written.keys()
    for row in written["rows"]:
        assert row["processes"] == processes
        assert row["tokens_per_step"] == 128 * processes
        assert 0 < row["section_ms"] < row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens_per_step"] / row["step_ms"] * 1e3)
        assert ("groups_ms" in row) == ("loop" not in row["optimizer"])
        for group in ("matrix products", "element-wise", "loss", "optimizer", "gradient buffers"):
            assert row.get("groups_ms", {group: 1.0})[group] > 0, group
        assert row["mfu"] is None, "no peak is known of a CPU"
        assert f"| {row['optimizer']} |" in output.with_suffix(".md").read_text()
    assert "no figure here is about a GPU" in result.stdout


def test_what_is_not_known_is_refused_by_name():
    command = [sys.executable, str(REPO / "benchmarks" / "train_step.py"), "--models", "gpt3"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "--models: gpt3: expected some of gpt2-124m" in result.stderr


def interrupted_benchmark(rank: int, output: str) -> tuple[str, list[str], list[str]]:
    """Three optimizers: the first is measured, the second runs out of memory, the third is interrupted."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    import train_step

    rows = iter(["measured", torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
    figures = dict.fromkeys(
        ("parameters", "processes", "tokens_per_step", "micro_batch_size", "step_ms", "section_ms", "share", "tokens_per_s",
         "tflops_per_process"), 1.0) | {"processes": 1, "mfu": None, "max_memory_gib": None}  # fmt: skip

    def measure(*_: object) -> dict[str, object]:
        found = next(rows)
        if isinstance(found, BaseException):
            raise found
        return dict(figures)

    optimizers = list(train_step.OPTIMIZERS)[:3]
    with (
        mock.patch.object(train_step, "measure", measure),
        mock.patch.object(train_step, "random_data", return_value="data"),
        mock.patch.object(train_step, "configure", return_value=None),
        mock.patch.object(
            sys, "argv", ["x", "--device", "cpu", "--optimizers", ";".join(optimizers), "--output", output]
        ),
    ):
        try:
            train_step.main()
            ended = "finished"
        except KeyboardInterrupt:
            ended = "interrupted"
    written = json.loads(Path(output + ".json").read_text())
    return ended, [row["optimizer"] for row in written["rows"]], written["failed"]


def test_rows_are_written_as_they_come_and_one_that_fails_costs_itself(tmp_path: Path) -> None:
    ended, rows, failed = run_distributed(interrupted_benchmark, 1, str(tmp_path / "out"))[0]
    assert ended == "interrupted"
    assert rows == ["lion split32"]
    assert failed == ["gpt2-tiny, lion split32, bf16 momentum: OutOfMemoryError: CUDA out of memory"]
