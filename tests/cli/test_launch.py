"""launch/torchrun.sh: two agents on this machine act as two nodes; exit codes, which torchrun replaces by 1."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import outcome, tiny_config, write_corpus

from megatron_lion.configfile import dump_config

REPO = Path(__file__).resolve().parents[2]


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Starts the launcher with these arguments and environment variables."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        ["bash", str(REPO / "launch" / "torchrun.sh"), *words],
        cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_of_two_processes_with_tensor_parallelism(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", corpus, train__steps=3)))
    words = (str(config), "--parallel.tensor_model_parallel_size", "2")
    variables = {"NNODES": "2", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    agents = [start(*words, **variables) for _ in range(2)]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    found = outcome(tmp_path / "run")
    alone = subprocess.run(
        [sys.executable, "-m", "megatron_lion", "pretrain", "--config", str(config), "--run_dir", str(tmp_path / "one")],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    reference = outcome(tmp_path / "one")["losses"]
    assert len(found["losses"]) == 3
    assert all(abs(ours - theirs) < 1e-4 for ours, theirs in zip(found["losses"], reference, strict=True))


def test_codes_of_a_wrong_setting_and_of_a_stop(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", corpus, train__steps=100000)))
    wrong = start(str(config), "--train.global_batch_size", "7", NPROC_PER_NODE="2")
    error = wrong.communicate(timeout=100)[1]
    assert wrong.returncode == 2, error
    assert error.count("train.global_batch_size") == 1
    job = start(str(config), NPROC_PER_NODE="2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    error = job.communicate(timeout=200)[1]
    assert job.returncode == 75, error
    assert "checkpoint saved; the same command resumes" in error


# Answers the query for the number of GPUs; at the dry run it writes the number of processes and ends the launcher.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *device_count*) echo asked >> "{folder}/asked"; {answer} ;;
    *--dry-run*) echo "$WORLD_SIZE" > "{folder}/world_size"; exit 3 ;;
esac
"""


@pytest.mark.parametrize(
    ("answer", "has_driver", "processes"),
    [
        ("echo a warning; echo 3", True, 3),
        ("echo 0", True, 2),
        ("exit 1", True, 2),
        ("echo 3", False, 2),
    ],
    ids=["GPUs that torch sees", "none visible", "no torch", "no driver"],
)
def test_processes_a_node(answer: str, has_driver: bool, processes: int, tmp_path: Path) -> None:
    """One for each GPU that torch sees; without NVIDIA's driver the launcher does not start Python to count."""
    if not has_driver and (Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()):
        pytest.skip("this machine has NVIDIA's driver")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "tail", "sed", "mktemp", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    scripts = {"python": FAKE_PYTHON.format(folder=tmp_path, answer=answer)}
    if has_driver:
        # Lists six lines for three GPUs, as with MIG: they must not be counted.
        scripts["nvidia-smi"] = "#!/bin/sh\nprintf '%s\\n' 1 2 3 4 5 6\n"
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = start("config.yaml", PATH=str(tools), PYTHON=str(tools / "python"), NPROC_PER_NODE="")
    error = job.communicate(timeout=100)[1]
    assert job.returncode == 3, error
    assert int((tmp_path / "world_size").read_text()) == processes
    assert (tmp_path / "asked").exists() == has_driver


def test_the_first_of_several_failed_ranks_counts(tmp_path: Path) -> None:
    """Ranks that lose their peer fail too, with another code, so the launcher takes the code of the first."""
    command = [sys.executable, "-m", "megatron_lion.jobs", "first-exit-code", str(tmp_path)]

    def answer() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout

    assert answer() == ""
    for rank, (code, written) in enumerate([(8, 3000), (5, 1000), (8, 2000)]):
        path = tmp_path / f"exit.{rank}.json"
        path.write_text(f'{{"rank": {rank}, "exit_code": {code}, "error": "x"}}')
        os.utime(path, ns=(written, written))
    assert answer() == "5\n"
