"""A running job that is asked to stop saves, leaves with 75, and the same command ends where the undisturbed twin ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lion.configfile import dump_config
from tests.tiny import tiny_config, write_corpus

REPO = Path(__file__).resolve().parents[2]
STEPS = 40


def start(config: Path, run_dir: Path, processes: int) -> subprocess.Popen[str]:
    launcher = ["-m"]
    if processes > 1:
        launcher = [
            "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m",
        ]  # fmt: skip
    words = ["megatron_lion", "pretrain", "--config", str(config), "--run_dir", str(run_dir)]
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        metrics = run_dir / "metrics.jsonl"
        if metrics.is_file() and any(json.loads(line)["step"] >= step for line in metrics.read_text().splitlines()):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    pytest.fail(f"no step {step} in time")


def fingerprint(run_dir: Path) -> str:
    manifest = json.loads((run_dir / "checkpoints" / f"step_{STEPS:07d}" / "manifest.json").read_text())
    return str(manifest["state_fingerprint"])


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_asked_to_stop(tmp_path: Path, number: signal.Signals, processes: int) -> None:
    corpus = write_corpus(tmp_path / "c_text_document")
    # Large batches, so that the signal finds steps still to come.
    config = tmp_path / "run.yaml"
    changes = {
        "train__steps": STEPS,
        "train__global_batch_size": 64,
        "train__micro_batch_size": 2,
        "model__hidden_dropout": 0.1,
    }
    config.write_text(dump_config(tiny_config(tmp_path / "run", corpus, **changes)))
    run_dir, twin = tmp_path / "run", tmp_path / "twin"
    process = start(config, run_dir, processes)
    wait_for_step(run_dir, 2, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=200)
    # torchrun has one code for every fault; the workers' own is in its report.
    assert process.returncode == (75 if processes == 1 else 1), error
    assert "checkpoint saved; the same command resumes" in error
    assert "Traceback" not in error or processes > 1
    done = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")]
    assert done
    assert 2 <= max(done) < STEPS
    for folder in (run_dir, twin):
        process = start(config, folder, processes)
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    assert fingerprint(run_dir) == fingerprint(twin)
