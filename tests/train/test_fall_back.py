"""A newest checkpoint that is incomplete, damaged or gone is refused; `--fall-back` resumes from the newest intact one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.cli import main
from megatron_lion.runs import steps
from megatron_lion.train import checkpoint as ckpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fall-back")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:07d}"


def without_manifest(run: Path) -> None:
    (step(run, 4) / "manifest.json").unlink()


def damaged_file(run: Path) -> None:
    path = step(run, 4) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[500] ^= 4
    path.write_bytes(bytes(content))


def damaged_manifest(run: Path) -> None:
    (step(run, 4) / "manifest.json").write_text("{")


def empty_folder_of_a_later_step(run: Path) -> None:
    step(run, 7).mkdir()


def absurd_name(run: Path) -> None:
    shutil.copytree(step(run, 2), run / "checkpoints" / "step_99999999999999999999")


def another_steps_copy(run: Path) -> None:
    shutil.rmtree(step(run, 4))
    shutil.copytree(step(run, 2), step(run, 4))


def link_instead_of_a_file(run: Path) -> None:
    """The digest would fit."""
    path = step(run, 4) / "__0_0.distcp"
    shutil.move(path, run / "elsewhere")
    path.symlink_to(run / "elsewhere")


def pipe_instead_of_a_file(run: Path) -> None:
    (step(run, 4) / "__0_0.distcp").unlink()
    os.mkfifo(step(run, 4) / "__0_0.distcp")


def no_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def empty_folder(run: Path) -> None:
    no_folder(run)
    (run / "checkpoints").mkdir()


def no_folder_by_an_earlier_version(run: Path) -> None:
    no_folder(run)
    (run / "newest_checkpoint").unlink()
    facts = json.loads((run / "run.json").read_text())
    del facts["run_id"], facts["sha256"]
    (run / "run.json").write_text(json.dumps(facts))


# What is done to the newest of two checkpoints, what the refusal reports, and what is moved aside (None: no whole one is left)
CASES: dict[str, tuple[Callable[[Path], None], str, list[str] | None]] = {
    "no manifest": (without_manifest, "step_0000004 has no manifest.json", ["step_0000004"]),
    "damaged file": (damaged_file, "__0_0.distcp: its SHA-256 does not match", ["step_0000004"]),
    "damaged manifest": (damaged_manifest, "manifest.json: damaged", ["step_0000004"]),
    "empty later step": (empty_folder_of_a_later_step, "step_0000007 has no manifest.json", ["step_0000007"]),
    "absurd name": (absurd_name, "not the name of a checkpoint", ["step_99999999999999999999"]),
    "copy of another step": (another_steps_copy, "holds step 2, but its name", ["step_0000004"]),
    "link": (link_instead_of_a_file, "__0_0.distcp: is no plain file but a link", ["step_0000004"]),
    "pipe": (pipe_instead_of_a_file, "__0_0.distcp: is no plain file but a link", ["step_0000004"]),
    "no folder": (no_folder, "holds no checkpoint, but step_0000004 was saved; mount or restore the folder", None),
    "empty folder": (empty_folder, "holds no checkpoint, but step_0000004 was saved; mount or restore", None),
    "earlier version": (no_folder_by_an_earlier_version, "holds no checkpoint, but step_0000002 was saved", None),
}
LATER = ("damaged manifest", "absurd name", "pipe", "empty folder", "earlier version")
"""Cases of the slow tests."""


def cases(*, are_used: bool) -> list[Any]:
    """The cases whose third value is there, or those without it."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in LATER else ())
        for name, (_, _, aside) in CASES.items()
        if (aside is not None) is are_used
    ]


def refused_then_fallen_back(rank: int, jobs: dict[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """(error, message, stderr) of the plain command and of `--fall-back`, for each run."""
    from megatron_lion.train.loop import pretrain

    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in jobs}
    for name, config in jobs.items():
        for fall_back in (False, True):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                kind, message = tiny.error_of(pretrain, config, fall_back=fall_back)
            found[name].append((kind, message, stderr.getvalue()))
    return found


def listing(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def tried(trained_on_cpu: Any, folder: Path) -> Callable[[str], tuple[Path, list[tuple[str, str, str]]]]:
    """Gives a case's run folder and its outcomes; those of the slow tests are made with the first of them."""
    made = functools.cache(lambda later: tried_now(trained_on_cpu, folder, later))
    return lambda name: tuple(found[name] for found in made(name in LATER))


def tried_now(trained_on_cpu: Any, folder: Path, later: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    runs = {
        name: Path(shutil.copytree(trained_on_cpu.run_dir, folder / f"case-{number}"))
        for number, name in enumerate(CASES)
        if (name in LATER) is later
    }
    for name, run in runs.items():
        CASES[name][0](run)
    jobs = {name: dataclasses.replace(trained_on_cpu, run_dir=str(run)) for name, run in runs.items()}
    first, second = run_distributed(refused_then_fallen_back, 2, jobs)
    for name in runs:
        assert [kind for kind, _, _ in first[name]] == [kind for kind, _, _ in second[name]], name
        assert second[name][0][2] == second[name][1][2] == "", "one rank prints"
    return runs, first


@pytest.mark.parametrize("name", [*cases(are_used=True), *cases(are_used=False)])
def test_the_newest_checkpoint_is_not_passed_over_silently(tried: Any, name: str) -> None:
    kind, message, _ = tried(name)[1][0]
    assert kind == "CheckpointError", message
    assert CASES[name][1] in message
    assert "--fall-back" in message or "--fresh" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", cases(are_used=True))
def test_fall_back_resumes_from_the_newest_whole_one(tried: Any, trained_on_cpu: Any, name: str) -> None:
    run, found = tried(name)
    kind, message, stderr = found[1]
    assert (kind, message) == ("", "")
    resumed_from = 2 if "step_0000004" in (CASES[name][2] or []) else 4
    for skipped in CASES[name][2] or []:
        lines = [line for line in stderr.splitlines() if line.startswith("--fall-back: ")]
        assert len(lines) == 1
        assert f"resuming from step_{resumed_from:07d}; moved {skipped} to skipped_{skipped}: " in lines[0]
        assert f"skipped_{skipped}" in listing(run)
    assert steps.list_steps(run) == [2, 4]
    ckpt.verify_checkpoint(tiny.newest_checkpoint(run))
    twin = json.loads((step(Path(trained_on_cpu.run_dir), 4) / "manifest.json").read_text())
    assert tiny.newest_checkpoint(run).manifest["state_fingerprint"] == twin["state_fingerprint"]
    assert (run / "newest_checkpoint").read_text() == "step_0000004\n"


@pytest.mark.parametrize("name", cases(are_used=False))
def test_fall_back_never_starts_from_step_zero(tried: Any, name: str) -> None:
    run, found = tried(name)
    kind, message, _ = found[1]
    assert kind == "CheckpointError", message
    assert "give --fresh to start over" in message
    assert listing(run) == []


def test_fall_back_moves_nothing_if_no_checkpoint_is_whole(trained_on_cpu: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    for number in (2, 4):
        (step(run, number) / "manifest.json").unlink()
    before = listing(run)
    jobs = {"": dataclasses.replace(trained_on_cpu, run_dir=str(run))}
    kind, message, _ = run_distributed(refused_then_fallen_back, 1, jobs)[0][""][1]
    assert kind == "CheckpointError"
    assert "--fall-back found no whole checkpoint, and moved nothing" in message
    assert listing(run) == before


def test_an_older_checkpoint_is_used_with_a_warning_if_the_newest_was_moved_away(
    trained_on_cpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message advises to move a folder away, so this is no error."""
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    shutil.rmtree(step(run, 4))
    assert tiny.newest_checkpoint(run).step == 2
    assert (
        f"{run}: step_0000004 was saved, but is not in {run / 'checkpoints'}; using step_0000002"
        in capsys.readouterr().err
    )


def test_a_run_that_ended_before_its_first_save_starts_over(trained_on_cpu: Any, tmp_path: Path) -> None:
    """Metrics alone do not show that anything was saved."""
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    no_folder(run)
    (run / "newest_checkpoint").unlink()
    jobs = {"": dataclasses.replace(trained_on_cpu, run_dir=str(run))}
    kind, message, stderr = run_distributed(refused_then_fallen_back, 1, jobs)[0][""][0]
    assert (kind, message) == ("", "")
    assert "step 4 is in metrics.jsonl, but no checkpoint was saved yet: starting from step 0" in stderr


def test_two_opposite_flags(trained_on_cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--config", str(Path(trained_on_cpu.run_dir, "config.yaml")), "--fresh", "--fall-back"]
    assert main(words) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("--fresh and --fall-back: give one of them; the first starts over, the second resumes")
    )


def test_retention_removes_a_link_and_not_what_it_leads_to(trained_on_cpu: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    elsewhere = tmp_path / "elsewhere"
    step(run, 2).rename(elsewhere)
    step(run, 2).symlink_to(elsewhere)
    (run / "checkpoints" / "step_0000001.tmp-removed").symlink_to(elsewhere)
    assert ckpt.remove_old(run, keep=1, always_keep=set()) == [2]
    assert listing(run) == ["latest", "step_0000004"]
    assert (elsewhere / "manifest.json").is_file()


def test_a_checkpoint_that_is_removed_while_it_is_read(trained_on_cpu: Any, tmp_path: Path) -> None:
    """Retention of a run in training; the reader's error is no damage."""
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    opened = steps.open_checkpoint(step(run, 2))
    ckpt.remove_old(run, keep=1, always_keep=set())
    for read in (
        lambda: ckpt.verify_checkpoint(opened),
        lambda: ckpt.read_tensors({}, opened.folder),
        lambda: steps.open_checkpoint(opened.folder),
    ):
        kind, message = tiny.error_of(read)
        assert kind == "CheckpointError", message
        assert (
            "step_0000002: was removed meanwhile; a run in training keeps its newest checkpoints (checkpoint.keep "
            in message
        )
