"""A sweep as a shell script and as a SLURM array: the texts, and their effect with a fake Python and SLURM."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_config, write_corpus, write_manifest

from megatron_lion.cli import main
from megatron_lion.configfile import dump_config
from megatron_lion.sweep.sweep_file import read_sweep


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    corpus = write_corpus(tmp_path / "c_text_document")
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(tiny_config("unused", corpus, train__test_every=2)))
    grid = [
        "--grid",
        "optimizer.name=lion,sgd",
        "--grid",
        "optimizer.lr=1e-3",
        "--grid",
        "lion:optimizer.betas=[0.9,0.95],[0.9,0.99]",
    ]
    return ["sweep", str(config), *grid, "--output", str(tmp_path / "a sweep")]


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_printed_script_runs_each_and_keeps_its_code(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--print"]) == 0
    script = tmp_path / "runs.sh"
    script.write_text(capsys.readouterr().out)
    subprocess.run(["sh", "-n", str(script)], check=True)
    python = executable(tmp_path / "python", 'echo "$*" >> "$0.log"; case "$*" in *sgd*) exit 6 ;; esac')
    subprocess.run(["sh", str(script)], check=True, env={**os.environ, "PYTHON": str(python)}, cwd=tmp_path)
    calls = (tmp_path / "python.log").read_text().splitlines()
    folder = tmp_path / "a sweep"
    assert len(calls) == 3
    assert calls[0].startswith(
        f"-m megatron_lion pretrain --config {folder}/base.yaml --run_dir {folder}/lion-lr0.001-betas0.9_0.95 "
    )
    assert "--optimizer.betas [0.9, 0.95]" in calls[0]
    assert [path.read_text() for path in sorted((folder / "exits").iterdir())] == ["0\n", "0\n", "6\n"]


def test_several_processes_are_started_by_the_launcher(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--print", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("-m megatron_lion.launcher --processes 2 pretrain ") == 3


REPO = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node0"}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with a fake SLURM of small scripts, and a launcher that records its arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "srun", 'shift; exec "$@"')
    executable(tools / "scontrol", f'echo "$*" >> {tmp_path}/scontrol.log; echo node0')
    executable(tools / "scancel", "exit 1")
    launch = executable(tmp_path / "launch", f'printf "%s|" "$@" > {tmp_path}/launched; exit "${{CODE:-0}}"')
    return {**os.environ, **SLURM, "PATH": f"{tools}:{os.environ['PATH']}", "LAUNCH": str(launch)}


@pytest.fixture
def array(
    words: list[str], tmp_path: Path, slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> tuple[Path, dict[str, str]]:
    """The array script, and the environment to run it in."""
    assert main([*words, "--slurm", "--processes", "4"]) == 0
    script = tmp_path / "a sweep" / "sweep.sbatch"
    shown = capsys.readouterr()
    assert shown.out == f"sbatch '{script}'\n"
    return script, slurm


def test_an_array_task_runs_its_run(array: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    script, environment = array
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --array=0-2\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert "export NPROC_PER_NODE=${NPROC_PER_NODE:-4}" in text
    subprocess.run(["bash", str(script)], check=True, env={**environment, "SLURM_ARRAY_TASK_ID": "1"}, cwd=tmp_path)
    folder = tmp_path / "a sweep"
    assert (tmp_path / "launched").read_text().split("|")[:-1] == [
        f"{folder}/base.yaml", "--run_dir", f"{folder}/lion-lr0.001-betas0.9_0.99",
        "--optimizer.name", "lion", "--optimizer.lr", "0.001", "--optimizer.betas", "[0.9, 0.99]",
    ]  # fmt: skip
    assert (folder / "exits" / "lion-lr0.001-betas0.9_0.99").read_text() == "0\n"
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_a_stopped_task_queues_itself_again_and_a_failed_one_is_told(
    array: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    script, environment = array
    codes = {}
    for task, code in (("0", "75"), ("2", "5"), ("3", "0")):
        variables = {**environment, "SLURM_ARRAY_TASK_ID": task, "CODE": code}
        codes[task] = subprocess.run(
            ["bash", str(script)], check=False, env=variables, cwd=tmp_path, capture_output=True
        ).returncode
    assert codes == {"0": 75, "2": 5, "3": 2}, "there is no fourth run"
    assert (tmp_path / "scontrol.log").read_text().count("requeue 77") == 1
    sweep = read_sweep(tmp_path / "a sweep")
    assert sweep is not None
    assert [entry.status for entry in sweep.runs] == ["waiting", "waiting", "failed"]


def test_the_plain_job_launches_its_arguments_and_queues_itself_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = ["bash", str(REPO / "launch" / "slurm.sbatch"), "run.yaml", "--data.path", "[a b]"]
    before = set(tmp_path.iterdir())
    for code in (0, 5, 75):
        done = subprocess.run(
            job, check=False, env={**slurm, "CODE": str(code)}, cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (code, "")
        assert (tmp_path / "launched").read_text() == "run.yaml|--data.path|[a b]|"
        assert (tmp_path / "scontrol.log").read_text().count("requeue 77") == (code == 75)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"launched", "scontrol.log"}


@pytest.mark.parametrize("kind", ["plain", "array"])
def test_the_signal_of_slurm_reaches_the_launcher(
    kind: str, array: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    script, environment = array
    executable(tmp_path / "launch", f"trap 'exit 75' USR1; touch {tmp_path}/ready; while :; do sleep 0.05; done")
    path = script if kind == "array" else REPO / "launch" / "slurm.sbatch"
    job = subprocess.Popen(["bash", str(path)], env={**environment, "SLURM_ARRAY_TASK_ID": "0"}, cwd=tmp_path)
    try:
        while not (tmp_path / "ready").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 75
    finally:
        job.kill()
    assert (tmp_path / "scontrol.log").read_text().count("requeue 77") == 1
    assert len(list((tmp_path / "a sweep" / "exits").iterdir())) == (kind == "array")


def test_the_array_is_made_from_the_template(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that a user adds is kept in the array; if the line that chooses the run is missing, nothing is written."""
    launch = tmp_path / "launch folder"
    launch.mkdir()
    monkeypatch.setattr("megatron_lion.sweep.scripts.shipped_folder", lambda name: launch)
    text = (REPO / "launch" / "slurm.sbatch").read_text()
    template, script = launch / "slurm.sbatch", tmp_path / "a sweep" / "sweep.sbatch"
    template.write_text(text.replace("#SBATCH --requeue\n", "#SBATCH --requeue\n#SBATCH --partition=big\n"))
    assert main([*words, "--slurm", "--processes", "2"]) == 0
    made = script.read_text().splitlines()
    assert "#SBATCH --partition=big" in made
    asked = [line.split("=")[0] for line in made if line.startswith("#SBATCH")]
    assert len(asked) == len(set(asked)) == text.count("\n#SBATCH") + 2, "the partition and --array"
    assert "launch folder/torchrun.sh'}" in next(line for line in made if line.startswith("LAUNCH="))
    # torchrun.sh of an installed package finds no environment beside it.
    assert f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}" in made
    script.unlink()
    template.write_text(text.replace("# A sweep chooses", "# Somebody chose"))
    assert main([*words, "--slurm"]) == 9
    assert "has 0 lines that begin with '# A sweep chooses'" in capsys.readouterr().err
    assert not script.exists()


def test_nothing_is_written_for_runs_that_are_finished(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--print"]) == 0
    for name in ("lion-lr0.001-betas0.9_0.95", "lion-lr0.001-betas0.9_0.99", "sgd-lr0.001"):
        write_manifest(tmp_path / "a sweep" / name / "checkpoints" / "step_0000005", 5)
    capsys.readouterr()
    for form in ("--print", "--slurm"):
        assert main([*words, form]) == 0
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "nothing to do: every run is finished" in shown.err
