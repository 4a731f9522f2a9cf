"""launch/torchrun.sh and the launcher behind it: ports, signals, exit codes, files left behind, two nodes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_processes import LAUNCH, REPO, Job, alive, free_port, listeners, local, outer_interface, started
from tiny import outcome, tiny_config, write_corpus

from megatron_lion import launcher
from megatron_lion.configfile import dump_config

pytestmark = pytest.mark.timeout(900)  # each test starts processes that import torch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def long_run(folder: Path, corpus: str, **changes: object) -> Path:
    """Writes the settings of a run that does not end by itself in a test."""
    changes = {"train__steps": 10**6, "schedule__kind": "constant", **changes}
    path = folder / "run.yaml"
    path.write_text(dump_config(tiny_config(folder / "run", corpus, **changes)))
    return path


def trains(folder: Path) -> bool:
    """Whether the run in this folder has logged three steps."""
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") > 2


def saved_everything(folder: Path) -> bool:
    """Whether the newest checkpoint is of the last logged step."""
    found = outcome(folder / "run")
    return bool(found["manifest"]["step"] == len(found["losses"]))


def ended_on_request(job: Job, folder: Path) -> None:
    """Asserts what must be true after every kind of stop."""
    assert job.code() == 75, job.errors
    assert not job.running(), "no process is left"
    assert job.errors.splitlines()[-1].endswith("checkpoint saved; the same command resumes"), job.errors
    assert job.errors.count("checkpoint saved") == 1, "one process reports it"
    assert "Traceback" not in job.errors
    assert saved_everything(folder)
    assert list(job.temporary.iterdir()) == []


def test_a_job_of_two_processes_and_a_signal_to_all_of_them(tmp_path: Path, corpus: str) -> None:
    """Nothing listens outside of this machine; SLURM's signal to a whole step saves, leaves no process and no file."""
    config = long_run(tmp_path, corpus)
    # Cluster profiles name a network interface for jobs of several nodes.
    named = {name: outer_interface() or "lo" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    with started((*LAUNCH, str(config)), tmp_path / "job", NPROC_PER_NODE="2", **named) as job:
        job.wait_until(lambda: trains(tmp_path))
        running = job.running()
        assert len(job.ranks()) == 2
        found = listeners(running)
        assert all(local(address) for address in found), found
        job.signal_all(signal.SIGUSR1)
        ended_on_request(job, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM"])
def test_a_signal_to_the_group_of_the_launcher(name: str, tmp_path: Path, corpus: str) -> None:
    """A terminal sends SIGINT (Ctrl-C), SIGQUIT and SIGHUP (closed) so, GNU timeout sends SIGTERM."""
    with started((*LAUNCH, str(long_run(tmp_path, corpus))), tmp_path / "job", NPROC_PER_NODE="2") as job:
        job.wait_until(lambda: trains(tmp_path))
        job.signal_group(signal.Signals[name])
        ended_on_request(job, tmp_path)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(tmp_path: Path, corpus: str) -> None:
    with started((*LAUNCH, str(long_run(tmp_path, corpus))), tmp_path / "job", NPROC_PER_NODE="2") as job:
        job.wait_until(lambda: trains(tmp_path))
        assert len(job.ranks()) == 2
        job.signal(signal.SIGKILL)
        job.wait_for_all()
    assert saved_everything(tmp_path), "the ranks saved"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(rank: int, tmp_path: Path, corpus: str) -> None:
    config = long_run(tmp_path, corpus, checkpoint__every=2)
    with started((*LAUNCH, str(config)), tmp_path / "job", NPROC_PER_NODE="2") as job:
        job.wait_until(lambda: trains(tmp_path) and len(job.ranks()) == 2)
        job.ranks()[rank].kill()
        assert job.code() == 8, job.errors
        assert not job.running()
        last = job.errors.splitlines()[-1]
        assert last.startswith(
            f"megatron-lion: rank {rank} on {socket.gethostname()} was lost: it was ended by SIGKILL"
        )
        assert list(job.temporary.iterdir()) == []


ONE = (sys.executable, "-m", "megatron_lion", "pretrain", "--config")
BY_JOBS = (
    sys.executable, "-c",
    "import sys; from megatron_lion.jobs import Jobs\n"
    "with Jobs() as jobs: sys.exit(jobs.run('pretrain', ['--config', sys.argv[1]], 2))",
)  # fmt: skip
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_lion", "pretrain", "--config",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [ONE, BY_JOBS, TORCHRUN], ids=["one process", "sweep, demo and reproduce", "torchrun"]
)
def test_listeners_of_the_other_ways_to_start(command: tuple[str, ...], tmp_path: Path, corpus: str) -> None:
    named = {"GLOO_SOCKET_IFNAME": outer_interface() or "lo"}
    with started((*command, str(long_run(tmp_path, corpus))), tmp_path / "job", **named) as job:
        job.wait_until(lambda: trains(tmp_path))
        running = job.running()
        if (
            command is TORCHRUN
        ):  # its agent listens on all interfaces, which docs/launching.md warns of; the ranks do not
            assert not all(local(address) for address in listeners(running)), "this torch is safe: change the warning"
            running = list(job.ranks().values())
        found = listeners(running)
        assert all(local(address) for address in found), found
        job.signal(signal.SIGTERM)
        assert job.code() == (1 if command is TORCHRUN else 75), job.errors
        job.wait_for_all()
        assert saved_everything(tmp_path)
        if command is not TORCHRUN:
            assert list(job.temporary.iterdir()) == []


@pytest.mark.slow
def test_a_save_that_takes_longer_than_half_a_minute(tmp_path: Path, corpus: str) -> None:
    """torchrun kills its workers 30 seconds after a signal."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import sys, time\n"
        "def slow(event, arguments):\n"
        "    if event == 'os.mkdir' and 'checkpoints/step_' in str(arguments[0]) and slow.armed:\n"
        "        slow.armed = False\n"
        "        time.sleep(35)\n"
        "slow.armed = True\n"
        "sys.addaudithook(slow)\n"
    )
    variables = {"NPROC_PER_NODE": "2", "PYTHONPATH": f"{late}:{REPO}"}
    with started((*LAUNCH, str(long_run(tmp_path, corpus))), tmp_path / "job", **variables) as job:
        job.wait_until(lambda: trains(tmp_path))
        asked = time.monotonic()
        job.signal(signal.SIGTERM)
        ended_on_request(job, tmp_path)
        assert time.monotonic() - asked > 35


@pytest.mark.slow
def test_two_nodes_of_two_processes_with_tensor_parallelism(tmp_path: Path, corpus: str) -> None:
    """Two launchers on this machine act as two nodes."""
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", corpus, train__steps=3)))
    words = (*LAUNCH, str(config), "--parallel.tensor_model_parallel_size", "2")
    variables = {
        "NNODES": "2", "NPROC_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "JOB_ID": "x" * 32,
    }  # fmt: skip
    with started(words, tmp_path / "a", **variables) as first, started(words, tmp_path / "b", **variables) as second:
        assert [first.code(), second.code()] == [0, 0], first.errors + second.errors
    found = outcome(tmp_path / "run")
    alone = subprocess.run(
        [sys.executable, "-m", "megatron_lion", "pretrain", "--config", str(config), "--run_dir", str(tmp_path / "one")],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    reference = outcome(tmp_path / "one")["losses"]
    assert len(found["losses"]) == 3
    assert all(abs(ours - theirs) < 1e-4 for ours, theirs in zip(found["losses"], reference, strict=True))


@pytest.mark.slow
def test_a_stop_and_an_error_on_one_of_two_nodes(tmp_path: Path, corpus: str) -> None:
    """Both nodes end with the code of the one node."""
    config = long_run(tmp_path, corpus)
    variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "JOB_ID": "x" * 32}
    words = (*LAUNCH, str(config))
    port = {"MASTER_PORT": str(free_port())}
    with (
        started(words, tmp_path / "a", **variables, **port) as first,
        started(words, tmp_path / "b", **variables, **port) as second,
    ):
        first.wait_until(lambda: trains(tmp_path))
        found = listeners(first.running() + second.running())
        assert all(local(address) for address in found), "MASTER_ADDR is loopback here, and nothing else is listened on"
        second.signal(signal.SIGTERM)
        assert [first.code(), second.code()] == [75, 75], first.errors + second.errors
    port = {"MASTER_PORT": str(free_port())}
    with (
        started(words, tmp_path / "c", **variables, **port) as first,
        started(words, tmp_path / "d", **variables, **port) as second,
    ):
        first.wait_until(lambda: len(first.ranks()) + len(second.ranks()) == 2)
        [rank] = second.ranks().values()
        first.wait_until(lambda: outcome(tmp_path / "run")["manifest"] is not None and trains(tmp_path))
        rank.kill()
        assert [first.code(), second.code()] == [8, 8], first.errors + second.errors
        assert second.errors.splitlines()[-1].startswith("megatron-lion: rank "), second.errors
        assert not [process for process in first.running() + second.running() if alive(process)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "so JOB_ID is needed: a random word"),
        ({"JOB_ID": "x"}, "so MASTER_ADDR is needed"),
        ({"SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_several_nodes_need_variables(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("JOB_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.main(["--nodes", "2", "--processes", "1", "env"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_wrong_setting_is_reported_once(tmp_path: Path, corpus: str) -> None:
    words = (*LAUNCH, str(long_run(tmp_path, corpus)), "--train.global_batch_size", "7")
    with started(words, tmp_path / "job", NPROC_PER_NODE="2") as job:
        assert job.code() == 2, job.errors
        assert job.errors.count("train.global_batch_size") == 1
        assert list(job.temporary.iterdir()) == []


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
def test_processes_a_node(
    answer: str, has_driver: bool, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each GPU that torch sees; without NVIDIA's driver the launcher does not start Python to count."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\n{answer}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi" if has_driver else None)
    assert launcher.count_processes([]) == processes
    monkeypatch.undo()
    assert (tmp_path / "asked").exists() == has_driver
