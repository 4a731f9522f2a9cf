"""A checkpoint is read only as the step that its folder names, in the run that wrote it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.errors import CheckpointError
from megatron_lion.runs import steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def others(trained_on_cpu: Any, folder: Path) -> dict[str, Path]:
    """Runs on the same data that differ in the seed, in the learning rate, and in nothing."""
    changed = {
        "seed": dataclasses.replace(trained_on_cpu, seed=99),
        "rate": dataclasses.replace(trained_on_cpu, optimizer=dataclasses.replace(trained_on_cpu.optimizer, lr=5e-3)),
        "twin": trained_on_cpu,
    }
    jobs = {
        name: dataclasses.replace(config, run_dir=str(folder / f"other-{name}")) for name, config in changed.items()
    }
    run_distributed(tiny.train_each, 2, jobs)
    return {name: Path(config.run_dir) for name, config in jobs.items()}


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:07d}"


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes entries of a manifest, or removes those that are `...`, and makes the digest fit."""
    import hashlib

    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))


def copied_to_a_later_step(run: Path, others: dict[str, Path]) -> None:
    shutil.rmtree(step(run, 4))
    shutil.copytree(step(run, 2), step(run, 4))


def swapped(run: Path, others: dict[str, Path]) -> None:
    step(run, 2).rename(run / "away")
    step(run, 4).rename(step(run, 2))
    (run / "away").rename(step(run, 4))


def of_another_run(name: str) -> Callable[[Path, dict[str, Path]], None]:
    def put(run: Path, others: dict[str, Path]) -> None:
        shutil.rmtree(step(run, 4))
        shutil.copytree(step(others[name], 4), step(run, 4))

    return put


def of_another_run_without_id(name: str) -> Callable[[Path, dict[str, Path]], None]:
    def put(run: Path, others: dict[str, Path]) -> None:
        of_another_run(name)(run, others)
        rewrite(step(run, 4), run_id=...)

    return put


def of_another_seed_by_an_earlier_version(run: Path, others: dict[str, Path]) -> None:
    of_another_run("seed")(run, others)
    rewrite(step(run, 4), run_id=..., settings=...)


def named_like_a_huge_step(run: Path, others: dict[str, Path]) -> None:
    shutil.copytree(step(run, 2), run / "checkpoints" / "step_99999999999999999999")


def beyond_the_last_step(run: Path, others: dict[str, Path]) -> None:
    shutil.copytree(step(run, 4), step(run, 9))
    rewrite(step(run, 9), step=9, consumed_samples=9 * 8)


def with_other_samples(run: Path, others: dict[str, Path]) -> None:
    rewrite(step(run, 4), consumed_samples=7)


def with_leading_zeros(run: Path, others: dict[str, Path]) -> None:
    step(run, 4).rename(run / "checkpoints" / "step_000000000004")


WRONG: dict[str, tuple[Callable[[Path, dict[str, Path]], None], str]] = {
    "copied to a later step": (copied_to_a_later_step, "step_0000004: holds step 2, but its name is that of step 4"),
    "swapped": (swapped, "step_0000004: holds step 2, but its name is that of step 4"),
    "other seed": (of_another_run("seed"), "step_0000004: belongs to another run (run id "),
    "other rate": (of_another_run("rate"), "step_0000004: belongs to another run (run id "),
    "twin": (of_another_run("twin"), "step_0000004: belongs to another run (run id "),
    "other seed, no id": (of_another_run_without_id("seed"), "run with other settings (seed: 99, now 1234)"),
    "other rate, no id": (of_another_run_without_id("rate"), "(optimizer.lr: 0.005, now 0.001)"),
    "other seed, earlier version": (of_another_seed_by_an_earlier_version, "(seed: 99, now 1234)"),
    "huge step": (named_like_a_huge_step, "step_99999999999999999999: not the name of a checkpoint"),
    "beyond the end": (beyond_the_last_step, "step 9 is beyond train.steps 4"),
    "other samples": (with_other_samples, "consumed_samples 7, but 4 steps of 8 samples were taken"),
    "leading zeros": (with_leading_zeros, "step_000000000004: not the name of a checkpoint"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def refused(trained_on_cpu: Any, others: dict[str, Path], folder: Path) -> Callable[[str], tuple[str, str]]:
    """Resumes a run with each wrong checkpoint in it, in one job; checks that no checkpoint was touched."""
    jobs = {}
    for number, (name, (change, _)) in enumerate(WRONG.items()):
        run = Path(shutil.copytree(trained_on_cpu.run_dir, folder / f"wrong-{number}"))
        change(run, others)
        jobs[name] = dataclasses.replace(trained_on_cpu, run_dir=str(run))
    before = {name: contents(Path(config.run_dir, "checkpoints")) for name, config in jobs.items()}
    found = run_distributed(tiny.errors_of_each, 2, jobs)
    for name, config in jobs.items():
        assert contents(Path(config.run_dir, "checkpoints")) == before[name], name
        assert found[1][name][0] == found[0][name][0], name
    return lambda name: found[0][name]


@pytest.mark.parametrize("name", list(WRONG))
def test_a_checkpoint_of_another_step_or_run_is_refused(refused: Callable[[str], tuple[str, str]], name: str) -> None:
    kind, message = refused(name)
    assert kind == "CheckpointError", message
    assert WRONG[name][1] in message
    assert "\n" not in message


@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("huge step", "leading zeros")])
def test_every_reader_compares(trained_on_cpu: Any, others: dict[str, Path], tmp_path: Path, name: str) -> None:
    """evaluate, probe, export and generate open a step by this function; a sweep asks whether it is the run's own."""
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    last = 9 if name == "beyond the end" else 4
    assert steps.has_own_checkpoint(run, 4)
    WRONG[name][0](run, others)
    with pytest.raises(CheckpointError) as caught:
        steps.open_checkpoint(step(run, last))
    assert WRONG[name][1] in str(caught.value)
    assert not steps.has_own_checkpoint(run, last)


def test_a_run_keeps_its_id_wherever_its_folder_goes(trained_on_cpu: Any, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "elsewhere" / "copy"))
    facts = json.loads((whole / "run.json").read_text())
    ids = {json.loads((step(whole, number) / "manifest.json").read_text())["run_id"] for number in (2, 4)}
    assert ids == {facts["run_id"]}
    assert len(facts["run_id"]) == 32
    shutil.rmtree(step(whole, 4))
    resumed = run_distributed(tiny.train_each, 2, {"": dataclasses.replace(trained_on_cpu, run_dir=str(whole))})[0][""]
    twin = json.loads((step(Path(trained_on_cpu.run_dir), 4) / "manifest.json").read_text())
    assert resumed["manifest"]["state_fingerprint"] == twin["state_fingerprint"]
    assert resumed["manifest"]["run_id"] == facts["run_id"]
    assert json.loads((whole / "run.json").read_text())["run_id"] == facts["run_id"]


def resume_and_listen(rank: int, configs: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Resumes runs; returns each one's error and what it wrote to stderr."""
    import contextlib
    import io

    from megatron_lion.train.loop import pretrain

    found = {}
    for name, config in configs.items():
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            kind, message = tiny.error_of(pretrain, config)
        found[name] = kind, message, stderr.getvalue()
    return found


def test_an_earlier_versions_run_gets_an_id_when_it_resumes(trained_on_cpu: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run"))
    shutil.rmtree(step(run, 4))
    rewrite(step(run, 2), run_id=..., settings=...)
    facts = json.loads((run / "run.json").read_text())
    before = facts.pop("run_id")
    del facts["sha256"]
    (run / "run.json").write_text(json.dumps(facts))
    (run / "newest_checkpoint").unlink()
    config = dataclasses.replace(trained_on_cpu, run_dir=str(run))
    kind, message, stderr = run_distributed(resume_and_listen, 1, {"": config})[0][""]
    assert (kind, message) == ("", "")
    assert [line for line in stderr.splitlines() if "run id" in line] == [
        f"{run}: has checkpoints without a run id, which an earlier version wrote; whether they belong to this run was not checked"
    ]
    after = json.loads((run / "run.json").read_text())["run_id"]
    assert len(after) == 32
    assert after != before
    assert json.loads((step(run, 4) / "manifest.json").read_text())["run_id"] == after


def test_a_lost_run_json_takes_the_id_of_the_checkpoints(
    trained_on_cpu: Any, others: dict[str, Path], tmp_path: Path
) -> None:
    lost, mixed, damaged = (
        Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / name)) for name in ("lost", "mixed", "damaged")
    )
    own = json.loads((lost / "run.json").read_text())["run_id"]
    (lost / "run.json").unlink()
    (mixed / "run.json").unlink()
    (damaged / "run.json").write_text('{"run_id": "none"}')
    of_another_run("twin")(mixed, others)
    jobs = {path.name: dataclasses.replace(trained_on_cpu, run_dir=str(path)) for path in (lost, mixed, damaged)}
    found = run_distributed(resume_and_listen, 1, jobs)[0]
    assert found["lost"][:2] == ("", "")
    assert json.loads((lost / "run.json").read_text())["run_id"] == own
    assert found["mixed"][0] == "CheckpointError"
    assert "step_0000002 and step_0000004 belong to different runs" in found["mixed"][1]
    assert found["damaged"][0] == "CheckpointError"
    assert "run.json: run_id must be 32 hexadecimal digits" in found["damaged"][1]


def save_over(rank: int, jobs: dict[str, tuple[Any, Path]]) -> dict[str, tuple[str, str]]:
    """Takes two steps from step 2 and saves them, after something else got the name of the new checkpoint."""
    from megatron_lion.runs.identity import read_run_id
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    found = {}
    for name, (config, taken_by) in jobs.items():
        run_dir = Path(config.run_dir)
        with tiny.opened_run(config) as run:
            restore_run(run, steps.open_checkpoint(step(run_dir, 2)))
            run.run_id = read_run_id(run_dir)
            batches = run.train_batches()
            for _ in range(2):
                tiny.step_once(run, batches)
            if rank == 0:
                if taken_by.is_dir():
                    shutil.copytree(taken_by, step(run_dir, 4))
                else:
                    os.symlink(taken_by, step(run_dir, 4))
            found[name] = tiny.error_of(save_run, run)
    return found


def test_a_state_is_never_dropped_for_what_has_its_name(
    trained_on_cpu: Any, others: dict[str, Path], tmp_path: Path
) -> None:
    """Only the same state of the same run may be there already."""
    cases = {
        "same": Path(trained_on_cpu.run_dir) / "checkpoints" / "step_0000004",
        "older": Path(trained_on_cpu.run_dir) / "checkpoints" / "step_0000002",
        "twin": step(others["twin"], 4),
        "rate": step(others["rate"], 4),
        "half": tmp_path / "half",
        "dangling": tmp_path / "nothing",
        "forged": tmp_path / "forged",
    }
    cases["half"].mkdir()
    shutil.copytree(cases["same"], cases["forged"])
    rewrite(cases["forged"], state_fingerprint="0" * 32)
    jobs = {}
    for name, taken_by in cases.items():
        run = Path(shutil.copytree(trained_on_cpu.run_dir, tmp_path / f"run-{name}"))
        shutil.rmtree(step(run, 4))
        jobs[name] = dataclasses.replace(trained_on_cpu, run_dir=str(run)), taken_by
    for found in run_distributed(save_over, 2, jobs):
        assert found["same"] == ("", "")
        for name in set(cases) - {"same"}:
            kind, message = found[name]
            assert kind == "CheckpointError", (name, message)
            assert "step_0000004: cannot be saved" in message, name
            assert "nothing was saved; move it away" in message, name
        assert "with another state_fingerprint" in found["forged"][1]
    for name, (config, _) in jobs.items():
        assert not list(Path(config.run_dir, "checkpoints").glob("*.tmp-*")), name
