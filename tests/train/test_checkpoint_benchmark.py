"""The benchmark of checkpoints runs on one and two processes and writes its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PARTS = [
    "save", "— state fingerprint", "— weights fingerprint", "— state as sharded tensors", "restore", "— verify",
    "torch.save, fsync", "torch.load", "safetensors save_file, fsync", "safetensors load_file",
]  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "layouts"),
    [
        pytest.param(1, ["fully_reshardable"], id="one process"),
        pytest.param(2, ["fully_reshardable", "dp_reshardable"], id="two processes", marks=pytest.mark.slow),
    ],
)
def test_the_table_of_a_tiny_model(processes: int, layouts: list[str], tmp_path: Path) -> None:
    output = tmp_path / "results" / "checkpoint_time"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(REPO / "benchmarks" / "checkpoint_time.py"), "--quick", "--device", "cpu", "--repeats", "1"]
    command += ["--masters", "split32", "--layouts", ",".join(layouts), "--folder", str(tmp_path)]
    result = subprocess.run(
        [*command, "--output", str(output)], env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = json.loads(output.with_suffix(".json").read_text())
    assert {"date", "device", "commit", "versions", "repeats"} <= written.keys()
    assert [(row["layout"], row["part"]) for row in written["rows"]] == [(at, part) for at in layouts for part in PARTS]
    for row in written["rows"]:
        assert row["processes"] == processes
        assert row["ms"] > 0
        assert row["first_ms"] > 0
        assert row["least_ms"] <= row["ms"]
        # fp32 master weights and momentum, bf16 weights, and little else.
        assert 1 < row["bytes"] / (10 * row["parameters"]) < 1.5
        assert row["largest_file"] <= row["bytes"]
        assert f"| {row['part']} |" in output.with_suffix(".md").read_text()
    saves = [row for row in written["rows"] if row["part"] == "save"]
    assert all(row["largest_file"] < 0.8 * row["bytes"] for row in saves if processes == 2), "each rank writes its part"
    assert not list(tmp_path.glob("checkpoint-time-*")), "the checkpoints are removed"
