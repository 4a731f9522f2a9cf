"""A sweep runs its missing runs: real runs, and fake ones for tests of the bookkeeping."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import config_file, statuses
from tiny import outcome

from megatron_lion.cli import main
from megatron_lion.configfile import load_config
from megatron_lion.jobs import Jobs
from megatron_lion.sweep.sweep_file import read_sweep
from megatron_lion.sweep.warm_runs import can_fork

REPO = Path(__file__).resolve().parents[2]


# --- real runs ---

GRID = [
    "--grid",
    "optimizer.name=lion,sgd",
    "--grid",
    "lion:optimizer.lr=1e30,1e-2",
    "--grid",
    "sgd:optimizer.lr=0.1,0.3",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """2 × 2 runs, the first of which diverges."""
    root = tmp_path_factory.mktemp("swept")
    path = config_file(root, corpus, optimizer__clip_grad=0.0)
    words = ["sweep", str(path), *GRID, "--output", str(root / "sweep")]
    # Every interpreter that starts writes its command line.
    (root / "sitecustomize.py").write_text(
        f"import sys\nopen({str(root / 'started')!r}, 'a').write(f'{{sys.orig_argv}}\\n')\n"
    )
    path_before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), path_before]))}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lion", *words],
        capture_output=True, text=True, cwd=REPO, check=False, env=environment,
    )  # fmt: skip
    return words, done


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not can_fork(), reason="with a GPU each run is a new interpreter")
def test_all_runs_share_one_import(swept: tuple[list[str], Any]) -> None:
    words, done = swept
    assert done.returncode == 0, done.stderr
    started = (Path(words[-1]).parent / "started").read_text().splitlines()
    assert sum("forkserver" in line for line in started) == 1
    assert not [line for line in started if "pretrain" in line], "no run is an interpreter of its own"


@pytest.mark.slow
@pytest.mark.timeout(900)  # processes that import torch, on whatever else the machine does
def test_a_real_sweep_goes_on_after_a_run_that_diverged(swept: tuple[list[str], Any]) -> None:
    words, done = swept
    folder = Path(words[-1])
    assert done.returncode == 0, done.stderr
    assert statuses(folder) == {
        "lion-lr1e+30": "diverged", "lion-lr0.01": "finished", "sgd-lr0.1": "finished", "sgd-lr0.3": "finished",
    }  # fmt: skip
    assert (folder / "exits" / "lion-lr1e+30").read_text() == "6\n"
    assert "diverged; --retry-diverged runs them again: lion-lr1e+30" in done.stderr
    assert "[4/4] sgd-lr0.3" in done.stderr
    rows = {row["lr"]: row for row in csv.DictReader((folder / "table.csv").open())}
    assert rows["1e+30"]["valid loss"] == ""
    assert rows["1e+30"]["status"].startswith("diverged at step ")
    assert [lr for lr, row in rows.items() if row["choice"] == "best"] == ["0.01", "0.3"]
    for lr, name in (("0.01", "lion-lr0.01"), ("0.1", "sgd-lr0.1")):
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        measured = [line["valid/loss"] for line in lines if "valid/loss" in line]
        assert float(rows[lr]["valid loss"]) == measured[-1]
        assert float(rows[lr]["lowest"]) == min(measured)
    assert "0.3 is the largest tried" in done.stdout
    assert "LION: its best optimizer.lr 0.01 is the smallest tried" in done.stdout
    compare = next(
        line for line in done.stderr.splitlines() if line.startswith("compare the best (not confirmed; --confirm 5 ")
    )
    assert f"{folder} --best --output {folder}/comparison" in compare
    assert load_config(folder / "sgd-lr0.3" / "config.yaml").optimizer.lr == 0.3
    assert {path.name for path in folder.glob("cache/*")}, "the runs share their index files"


@pytest.mark.slow
@pytest.mark.timeout(900)  # processes that import torch, on whatever else the machine does
def test_the_same_command_again_runs_nothing_and_compare_takes_the_folder(
    swept: tuple[list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, done = swept
    monkeypatch.setattr(Jobs, "run", None)
    assert main(words) == 0
    assert capsys.readouterr().out.split() == done.stdout.split()
    assert main(["compare", words[-1], "--best", "--output", str(tmp_path / "out"), "--no-figures"]) == 0
    shown = capsys.readouterr().out
    assert "diverged at step" in shown
    assert "lr=0.01" in shown
    assert f"Runs of the sweep in {words[-1]}" in shown
    assert "LION: lr=1e+30 left out: diverged" in shown
    assert "Tuning" not in (tmp_path / "out" / "report.html").read_text(), "two rates are too few for a curve"


@pytest.mark.timeout(900)  # processes that import torch, on whatever else the machine does
@pytest.mark.slow
def test_a_signal_is_passed_on_and_the_same_command_goes_on(tmp_path: Path, corpus: str) -> None:
    path = config_file(tmp_path, corpus, train__steps=120, train__test_every=60)
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "megatron_lion", "sweep", str(path), "--grid", "seed=1,2", "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    wait_for_lines(process, folder / "lion-seed1" / "metrics.jsonl", 4)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 75, error
    assert out == ""
    assert error.splitlines()[-1] == (
        "megatron-lion: stopped in lion-seed1, 0 of 2 runs are finished; the same command continues"
    )
    assert "checkpoint saved; the same command resumes" in error
    assert statuses(folder) == {"lion-seed1": "interrupted", "lion-seed2": "waiting"}
    step = outcome(folder / "lion-seed1")["manifest"]["step"]
    assert 4 <= step < 120
    again = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {step}" in again.stderr
    assert statuses(folder) == {"lion-seed1": "finished", "lion-seed2": "finished"}
    assert len(outcome(folder / "lion-seed1")["losses"]) == 120


@pytest.mark.slow
@pytest.mark.timeout(900)  # processes that import torch, on whatever else the machine does
def test_a_killed_sweep_leaves_no_run_behind_that_goes_on_alone(tmp_path: Path, corpus: str) -> None:
    path = config_file(tmp_path, corpus, train__steps=100_000)
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "megatron_lion", "sweep", str(path), "--grid", "seed=1,2", "--output", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=REPO)
    wait_for_lines(process, folder / "lion-seed1" / "metrics.jsonl", 4)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while not (folder / "lion-seed1" / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline, "the run was not asked to save and exit"
        time.sleep(0.1)
    assert statuses(folder)["lion-seed1"] == "interrupted"


def wait_for_lines(process: subprocess.Popen[Any], path: Path, count: int) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        time.sleep(0.02)


def test_a_job_of_several_processes_tells_why_it_failed(tmp_path: Path, corpus: str) -> None:
    """The launcher returns the code of the rank that failed first."""
    path = config_file(tmp_path, corpus)
    with Jobs() as jobs:
        code = jobs.run("pretrain", ["--config", str(path), "--train.global_batch_size", "7"], processes=2)
    assert code == 2


# --- fake runs ---


def test_failed_runs_are_told_tried_again_and_diverged_ones_only_when_asked(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sweep",
        str(config_file(tmp_path, corpus)),
        "--grid",
        "optimizer.lr=1,2,3,4",
        "--output",
        str(tmp_path / "s"),
    ]
    pretended["codes"] = {"lion-lr2": -9, "lion-lr3": 6, "lion-lr1": 8}
    assert main(words) == 8
    error = capsys.readouterr().err
    killed = "SIGKILL; if no user did that, the machine was probably out of memory"
    assert f"2 of 4 runs failed: lion-lr1 (code 8), lion-lr2 ({killed}); the same command runs them again" in error
    assert statuses(tmp_path / "s") == {
        "lion-lr1": "failed", "lion-lr2": "failed", "lion-lr3": "diverged", "lion-lr4": "finished",
    }  # fmt: skip
    pretended.update(codes={}, ran=[])
    assert main(words) == 0
    assert pretended["ran"] == ["lion-lr1", "lion-lr2"]
    pretended["ran"] = []
    assert main([*words, "--retry-diverged"]) == 0
    assert pretended["ran"] == ["lion-lr3"]
    shutil.rmtree(tmp_path / "s" / "lion-lr3" / "checkpoints")  # to free space
    pretended["ran"] = []
    assert main(words) == 0
    assert pretended["ran"] == []


@pytest.mark.parametrize(("interrupted", "code"), [("lion-lr1", 75), ("lion-lr2", 0)])
def test_a_signal_that_a_finishing_run_did_not_heed_stops_what_is_left(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], interrupted: str, code: int
) -> None:
    words = ["sweep", str(config_file(tmp_path, corpus)), "--grid", "optimizer.lr=1,2", "--output", str(tmp_path / "s")]
    pretended["interrupted"] = interrupted
    assert main(words) == code
    assert statuses(tmp_path / "s")["lion-lr2"] == ("finished" if code == 0 else "waiting")
    pretended["interrupted"] = None
    assert main(words) == 0
    assert pretended["ran"] == ["lion-lr1", "lion-lr2"]


def test_what_all_runs_share_ends_the_sweep_at_once(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(config_file(tmp_path, corpus)), "--grid", "optimizer.lr=1,2", "--output", str(tmp_path / "s")]
    pretended["codes"] = {"lion-lr1": 3}
    assert main(words) == 3
    assert "stopped at lion-lr1: it ended with code 3" in capsys.readouterr().err
    assert pretended["ran"] == ["lion-lr1"]
    pretended["codes"] = {"lion-lr1": 6, "lion-lr2": 6}
    assert main(words) == 6
    assert "every run diverged (lion-lr1, lion-lr2)" in capsys.readouterr().err


def test_runs_that_were_killed_give_the_code_of_a_lost_peer(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(config_file(tmp_path, corpus)), "--grid", "optimizer.lr=1,2", "--output", str(tmp_path / "s")]
    pretended["codes"] = {"lion-lr1": -9, "lion-lr2": -15}
    assert main(words) == 8
    error = capsys.readouterr().err
    assert "lion-lr1 (SIGKILL" in error
    assert "lion-lr2 (SIGTERM)" in error


def test_another_grid_adds_runs_and_knows_those_that_are_there(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = str(config_file(tmp_path, corpus)), str(tmp_path / "s")
    assert main(["sweep", path, "--grid", "optimizer.lr=1e-3,3e-3", "--output", output]) == 0
    more = ["--grid", "optimizer.lr=1e-3", "--grid", "seed=1,1234", "--grid", "optimizer.weight_decay=0.01"]
    assert main(["sweep", path, *more, "--output", output]) == 0
    assert pretended["ran"] == ["lion-lr0.001", "lion-lr0.003", "lion-lr0.001-seed1-weight_decay0.01"], (
        "seed 1234 is that of the config: the sweep has that run"
    )
    sweep = read_sweep(tmp_path / "s")
    assert sweep is not None
    assert [len(grid) for grid in sweep.grids] == [1, 3]
    # sgd has another weight decay: given as a grid, its runs may join the sweep.
    joined = ["--grid", "optimizer.name=sgd", "--grid", "optimizer.lr=0.3", "--grid", "optimizer.weight_decay=0"]
    assert main(["sweep", path, *joined, "--output", output]) == 0
    assert load_config(tmp_path / "s" / "base.yaml").optimizer.weight_decay == 0.01
    capsys.readouterr()
    assert (
        main(
            [
                "sweep",
                path,
                "--grid",
                "optimizer.lr=1",
                "--optimizer.weight_decay",
                "0",
                "--train.steps",
                "9",
                "--output",
                output,
            ]
        )
        == 4
    )
    error = capsys.readouterr().err
    assert "optimizer.weight_decay: 0.01, now 0.0" in error
    assert "train.steps: 4, now 9" in error
    assert "make them a --grid, or give another --output" in error
    assert len(pretended["ran"]) == 4


def test_how_runs_are_made_may_change_between_two_commands(
    tmp_path: Path, corpus: str, pretended: dict[str, Any]
) -> None:
    path, output = str(config_file(tmp_path, corpus)), str(tmp_path / "s")
    assert main(["sweep", path, "--grid", "optimizer.lr=1e-3", "--output", output]) == 0
    later = [
        "--grid",
        "optimizer.lr=1e-3,2e-3",
        "--train.micro_batch_size",
        "2",
        "--probe.every",
        "2",
        "--output",
        output,
    ]
    assert main(["sweep", path, *later]) == 0
    assert pretended["ran"] == ["lion-lr0.001", "lion-lr0.002"]
    assert (pretended["config"].train.micro_batch_size, pretended["config"].probe.every) == (2, 2)


def test_a_config_that_is_edited_meanwhile_changes_no_run(
    tmp_path: Path, corpus: str, pretended: dict[str, Any]
) -> None:
    path = config_file(tmp_path, corpus)
    words = ["sweep", str(path), "--grid", "optimizer.lr=1,2", "--output", str(tmp_path / "s")]
    assert main([*words, "--print"]) == 0
    path.write_text(path.read_text().replace("weight_decay: 0.01", "weight_decay: 0.5"))
    assert main(words) == 4
    base = tmp_path / "s" / "base.yaml"
    base.write_text(base.read_text().replace("weight_decay: 0.01", "weight_decay: 0.5"))
    assert main(words) == 4, "editing the sweep's own copy is rejected too"
    assert pretended["ran"] == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 7}', '{"format": 1, "runs": [{}]}'])
def test_a_damaged_list_is_named(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    words = ["sweep", str(config_file(tmp_path, corpus)), "--grid", "optimizer.lr=1", "--output", str(tmp_path / "s")]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(damage)
    assert main(words) == 4
    error = capsys.readouterr().err
    assert "sweep.json" in error
    assert error.count("\n") == 1


def test_two_sweeps_in_one_folder(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_lion.runs.folder import locked

    words = ["sweep", str(config_file(tmp_path, corpus)), "--grid", "optimizer.lr=1", "--output", str(tmp_path / "s")]
    with locked(tmp_path / "s"):
        assert main(words) == 7
    assert f"pid {os.getpid()}" in capsys.readouterr().err
    assert pretended["ran"] == []
