"""benchmarks/gpu.py: a rehearsal runs all code that a CPU can; a kill, an error or a limit ends at most one stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "benchmarks" / "gpu.py"
STAGES = ("facts", "correct", "kernel", "loop", "run", "peers", "bert")
FACTS = ("card", "memory_gib", "driver", "python", "torch", "triton", "megatron_core", "commit", "rehearsal", "time")
# Parts of goals that a rehearsal omits: sizes and peers for a GPU only.
GPU_ONLY = {
    "gpt2-355m split32, fp32 momentum", "flat-1b split32, fp32 momentum", "gpt2-355m split32, bf16 momentum",
    "flat-1b split32, bf16 momentum", "gpt2-355m split24, int8 momentum", "flat-1b split24, int8 momentum",
    "355M, micro-batch 8, dropout 0", "micro-batch 8, dropout 0", "gpt2-124m FlashLion 24-bit",
    "gpt2-124m-dp16 emerging-optimizers Lion + copy",
}  # fmt: skip
PATIENCE_S = 1000.0
pytestmark = pytest.mark.timeout(1200)


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(folder: Path, *words: str, python_path: Path | None = None) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--rehearse", "--output", str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Runs the check and returns its output; exit code 1 means that a row failed."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, output[-3000:]
    return output


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, "the check did not reach that point"
        time.sleep(0.02)


def kill_and_see_all_end(driver: subprocess.Popen[str], folder: Path) -> None:
    """Kills the driver; its children must end at once. A child that finished its work instead would add rows."""
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    rows = len(read(folder))
    until(lambda: all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in family))
    assert len(read(folder)) == rows


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a whole rehearsal."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "text.txt").write_text("The size of the buffer is given in bytes. " * 200)
    return folder, finish(start(folder, "--text", str(folder / "text.txt")))


@pytest.mark.slow
def test_every_stage_runs_and_every_check_passes(rehearsal: tuple[Path, str]) -> None:
    rows = read(rehearsal[0])
    assert list(dict.fromkeys(row["stage"] for row in rows)) == list(STAGES)
    assert [row for row in rows if "error" in row] == []
    assert [row for row in rows if row.get("passed") is False] == []
    skipped = {row["part"] for row in rows if "skipped" in row}
    assert "CUDA graph" in skipped
    assert [path.name for path in rehearsal[0].iterdir() if path.is_dir()] == ["gpu_data"], (
        "the files of a stage are removed"
    )
    assert "evaluate" not in skipped
    for row in rows:
        assert set(FACTS) <= row.keys(), row
        assert row["rehearsal"] is True


@pytest.mark.slow
def test_rows_hold_what_the_stages_are_for(rehearsal: tuple[Path, str]) -> None:
    rows = {(row["stage"], row["part"]): row for row in read(rehearsal[0])}
    assert rows["facts", "bandwidth"]["copy_gb_per_s"] > 0
    for part in ("clip 0: fp32 = shards", "clip 1: split32 = half-up master"):
        assert rows["correct", part]["passed"] is True
    stopped = rows["run", "SIGTERM, 2 workers, resume"]
    assert stopped["exit_code"] == 75
    assert 30 <= stopped["stopped_at"] < 130, "the signal must come in the middle"
    assert stopped["same_end"] is True
    probe = rows["run", "probe of GPT-2 Small"]
    assert 0 < probe["norm_ratio_over_sqrt_d"] < 1
    assert (probe["samples_per_batch"], probe["batches"], probe["weights"]) == (2, 4, "initial")
    profile = rows["loop", "micro-batch 16, dropout 0: profile"]
    for group in ("matrix products", "attention", "loss", "element-wise", "gradient buffers", "optimizer"):
        assert profile[group] > 0, group
    for source in ("ready batches", "real loader"):
        assert rows["bert", f"bert-tiny, {source}"]["tokens_per_s"] > 0


@pytest.mark.slow
def test_the_table_is_printed_after_every_stage(rehearsal: tuple[Path, str]) -> None:
    tables = rehearsal[1].split("stage    part")[1:]
    assert len(tables) == len(STAGES)
    for number, table in enumerate(tables):
        shown = {line.split(" ")[0] for line in table.splitlines() if line.split(" ")[0] in STAGES}
        assert shown == set(STAGES[: number + 1])


@pytest.mark.slow
def test_every_part_of_a_goal_is_a_row(rehearsal: tuple[Path, str]) -> None:
    """Otherwise a renamed part would always be reported as not measured."""
    rows = {(row["stage"], row["part"]): row for row in read(rehearsal[0])}
    goals = json.loads((REPO / "benchmarks" / "goals.json").read_text())["goals"]
    for goal in goals:
        for part in set(goal["parts"]) - GPU_ONLY:
            row = rows[goal["stage"], part]
            assert goal["field"] in row or "skipped" in row, (goal["id"], part)


@pytest.mark.slow
def test_a_killed_stage_costs_its_own_rows_and_a_killed_driver_none(tmp_path: Path) -> None:
    driver = start(tmp_path, "--only", "kernel", "peers")
    until(lambda: sum(row["stage"] == "kernel" for row in read(tmp_path)) >= 2)
    (stage,) = psutil.Process(driver.pid).children()
    stage.kill()
    until(lambda: any(row["stage"] == "peers" for row in read(tmp_path)))
    kill_and_see_all_end(driver, tmp_path)
    text = (tmp_path / "results.jsonl").read_text()
    assert text.endswith("\n")
    rows = read(tmp_path)
    kernel = [row for row in rows if row["stage"] == "kernel"]
    assert "kernel_ms" in kernel[0]
    assert "signal 9" in kernel[-1]["error"]


def test_a_killed_driver_leaves_no_process_of_stage_run(tmp_path: Path) -> None:
    driver = start(tmp_path, "--only", "run")
    until(lambda: (tmp_path / "gpu_run_files" / "on_cpu.log").exists())
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) >= 4, "the stage, two runs and the CPU's side"
    kill_and_see_all_end(driver, tmp_path)


def test_a_child_whose_parent_ended_before_it_asked_the_kernel_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that was killed just after a fork left a process that used the GPU to its end."""
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    from gpu_stages.stage import end_with_parent

    heard, said = os.pipe()
    parent = os.fork()
    if parent == 0:
        prepare = end_with_parent()
        own = os.getpid()
        if os.fork() == 0:
            while os.getppid() == own:
                time.sleep(0.01)
            prepare()
            os.write(said, b"alive")
        os._exit(0)
    os.close(said)
    os.waitpid(parent, 0)
    with open(heard, "rb") as pipe:
        assert pipe.read() == b""


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def test_a_stage_that_raises_and_a_peer_out_of_memory_leave_the_others_running(tmp_path: Path) -> None:
    """The first error simulates a machine without megatron-core, the second a card that is too small."""
    packages = tmp_path / "packages"
    package(packages, "megatron", "raise ImportError('megatron-core is not here')\n")
    package(
        packages, "lion_pytorch",
        "import torch\n\n\ndef Lion(*_, **__):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')\n",
    )  # fmt: skip
    output = finish(start(tmp_path / "out", "--only", "loop", "peers", python_path=packages), code=1)
    rows = read(tmp_path / "out")
    assert "3 error" in output
    (loop,) = [row for row in rows if row["stage"] == "loop"]
    assert loop["error"] == "ImportError: megatron-core is not here"
    peers = {row["part"]: row for row in rows if row["stage"] == "peers"}
    assert peers["lion-pytorch"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert peers["gpt2-124m ours split32"]["wall_ms"] > 0
    assert peers["gpt2-124m torch SGD fused"]["over_ours"] > 0


def test_no_stage_starts_that_does_not_fit_the_budget(tmp_path: Path) -> None:
    """A rehearsal's limits are 20 times those of a GPU: 200 s for `facts`, 1,200 s for `correct`."""
    finish(start(tmp_path, "--budget", "250", "--only", "facts", "correct"))
    rows = read(tmp_path)
    assert [row["part"] for row in rows] == ["device", "bandwidth", "matmul", "stage", "stage"]
    assert rows[-2]["seconds"] > 0
    assert rows[-1]["stage"] == "correct"
    assert rows[-1]["skipped"].startswith("needs 1200 s, 2")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    import gpu as module

    return module


def test_a_stage_is_killed_at_its_limit(tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CAPS", {"facts": 0.01, "peers": 0.02})
    monkeypatch.setattr(gpu, "GRACE_S", 0.05)
    monkeypatch.setattr(gpu, "REHEARSAL_SLACK", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(tmp_path)])
    for name in ("gpu_peers_files", "peers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "earlier").write_text("from another call, or from the user")
    assert gpu.main() == 1
    assert not (tmp_path / "gpu_peers_files").exists(), (
        "files of an earlier call would be mistaken for those of this one"
    )
    assert (tmp_path / "peers" / "earlier").exists()
    rows = read(tmp_path)
    assert [(row["stage"], row["error"].split(";")[0]) for row in rows] == [
        ("facts", "killed at its limit of 0.01 s"), ("peers", "killed at its limit of 0.02 s"),
    ]  # fmt: skip


def test_the_limits_fit_the_budget(gpu: Any) -> None:
    assert sum(gpu.CAPS.values()) <= 420
    assert list(gpu.CAPS) == list(STAGES)


def test_without_a_gpu_it_says_so(tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--commit", "abc"])
    assert gpu.main() == 9
    assert "--rehearse" in capsys.readouterr().err
    assert read(tmp_path) == []


def test_on_a_gpu_machine_whose_stages_fail_the_driver_goes_on(tmp_path: Path) -> None:
    """The driver reports a card that torch does not find: each stage records the reason, and none ends the others."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 580.159.04'\n")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(SCRIPT),
        "--output",
        str(tmp_path / "out"),
        "--only",
        "facts",
        "kernel",
        "--commit",
        "abc",
    ]
    # Ten times the budget: a loaded machine needs more than the 10 s of `facts` to start a process that imports torch.
    done = subprocess.run([*command, "--budget", "4200"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    rows = read(tmp_path / "out")
    assert {row["stage"] for row in rows} == {"facts", "kernel"}
    assert all(row["error"] for row in rows if row["part"] != "stage")
    for row in rows:
        assert (row["card"], row["memory_gib"], row["driver"]) == ("NVIDIA H100 80GB HBM3", 79.6, "580.159.04")
        assert (row["commit"], row["rehearsal"]) == ("abc", False)


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        (["--data", "FOLDER"], None, "no readable manifest.json (FileNotFoundError); give a folder made by"),
        (["--text", "FOLDER"], None, "not a file; give a text"),
        ([], "nonsense\n", "results.jsonl, line 1: not a JSON object; remove the line, or give another --output"),
        ([], "\xff\n", "results.jsonl, line 1: not a JSON object"),
        ([], "[1]\n", "line 1: no fields, so it is no row"),
        ([], json.dumps(dict.fromkeys(FACTS, "x") | {"stage": "facts", "part": "device", "rehearsal": False}) + "\n",
         "its rows have card x, this run has"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_before_the_first_stage(
    tmp_path: Path,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    words: list[str],
    rows: str | None,
    message: str,
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if rows is not None:
        (output / "results.jsonl").write_bytes(rows.encode("latin-1"))
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(output), *words])
    assert gpu.main() == 2
    assert message in capsys.readouterr().err
    assert rows is None or (output / "results.jsonl").read_bytes() == rows.encode("latin-1")


def test_missing_packages_are_named_unless_no_stage_needs_them(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_stages import preflight

    monkeypatch.setattr(preflight, "version_of", lambda package: None if package == "jsonargparse" else "1")
    args = SimpleNamespace(data=None, text=None, output=tmp_path, rehearse=True)
    reason = preflight.problem_of(args, {}, ["facts", "loop"])
    assert reason is not None
    assert reason.startswith("jsonargparse not found; run from the checkout's root with PYTHONPATH=.:wheels")
    assert preflight.problem_of(args, {}, ["facts", "kernel", "peers"]) is None


def test_an_output_that_cannot_be_made(tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(tmp_path / "file" / "below")])
    assert gpu.main() == 5
    assert "give a folder that can be created" in capsys.readouterr().err


def test_without_git_the_carried_commit_is_taken(tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import measuring

    monkeypatch.setenv("PATH", str(tmp_path))
    assert measuring.commit() == "unknown"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / measuring.CARRIED).write_text(f"abc1234 {measuring.source_digest()}\n")
    assert gpu.carried_commit() == "abc1234"
    (tmp_path / measuring.CARRIED).write_text("abc1234 0123456789abcdef\n")
    assert gpu.carried_commit() == "abc1234, with changed sources"


def test_a_peer_is_divided_by_ours_alone(tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If our contender fails, the next of its class must not become the baseline."""
    from gpu_stages import stage_peers as peers

    times = {"torch AdamW fused + copy": 4.0, "ours split32": 2.0}
    keep = dict.fromkeys(("parameters", "tensors", "device_ms", "bytes_per_parameter", "state_bytes_per_parameter", "launches",
                          "waits", "temporaries_bytes"))  # fmt: skip
    monkeypatch.setattr(
        peers, "measure", lambda size, group, *_: [{**keep, "class": "c", "wall_ms": times[group[0].name]}]
    )
    stage = gpu.Stage("peers", tmp_path, 60.0, True, {})
    adamw, lion = (SimpleNamespace(name=name) for name in times)
    base: dict[tuple[str, str], float] = {}
    for contender in (adamw, lion, adamw):
        peers.time_step(stage, "size", contender, base)
    text = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(line)["over_ours"] for line in text.splitlines()] == [None, 1.0, 2.0]


def test_a_part_that_does_not_fit_the_stage_is_skipped(tmp_path: Path, gpu: Any) -> None:
    stage = gpu.Stage("loop", tmp_path, cap_s=5.0, rehearse=True, facts={"card": "x"})
    ran: list[int] = []
    assert not stage.attempt("long", 60, lambda: ran.append(1))
    assert stage.attempt("short", 0, lambda: ran.append(2))
    assert ran == [2]
    (row,) = read(tmp_path)
    assert row["skipped"].startswith("needs 60 s, ")
