"""A refused start changes nothing of a run, and a resume records what a later start needs to notice lost checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

from megatron_lion.errors import StorageError
from megatron_lion.runs.folder import keep_settings

Work = Callable[[Path], object]


def unmount(run: Path) -> None:
    (run / "checkpoints").rename(run.with_name("away"))


def mount(run: Path) -> None:
    run.with_name("away").rename(run / "checkpoints")


def lose(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    unmount(run)


def age(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    del facts["run_id"], facts["sha256"]
    (run / "run.json").write_text(json.dumps(facts))
    (run / "newest_checkpoint").unlink()


def content(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock" and path.parent.name not in ("log", "cache")
    }


def start_in_turn(rank: int, starts: list[tuple[Any, Work | None]]) -> list[tuple[str, str, bool]]:
    """(error, message, whether the run folder is unchanged) of each start; the second item is done to the folder before."""
    from megatron_lion.train.loop import pretrain

    found = []
    for config, prepare in starts:
        run = Path(config.run_dir)
        if prepare is not None:
            prepare(run)
        before = content(run)
        with contextlib.redirect_stderr(io.StringIO()):
            kind, message = tiny.error_of(pretrain, config)
        found.append((kind, message, content(run) == before))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture
def config(trained_on_cpu: Any, tmp_path: Path) -> Any:
    return dataclasses.replace(
        trained_on_cpu, run_dir=shutil.copytree(trained_on_cpu.run_dir, tmp_path / "run").as_posix()
    )


def test_a_refused_start_changes_nothing(config: Any) -> None:
    """Else the original command would be refused from then on."""
    other_data = dataclasses.replace(config, data=dataclasses.replace(config.data, path=["/nowhere"]))
    starts = [
        (dataclasses.replace(config, seed=77), lose),
        (dataclasses.replace(config, name="other"), None),
        (other_data, mount),  # refused only when the data is opened
        (config, None),
    ]
    found = run_distributed(start_in_turn, 1, starts)[0]
    assert [kind for kind, _, _ in found] == ["CheckpointError", "CheckpointError", "DataError", ""], found
    assert "holds a run with other settings (seed: " in found[0][1]
    assert "holds no checkpoint, but step_0000004 was saved" in found[1][1]
    assert [unchanged for _, _, unchanged in found[:3]] == [True, True, True]


def test_an_earlier_versions_checkpoints_are_missed_after_a_resume(config: Any) -> None:
    """The resume gives the run an id; the rule for runs without one no longer holds then."""
    resumed, lost = run_distributed(start_in_turn, 1, [(config, age), (config, unmount)])[0]
    assert resumed[0] == "", resumed
    assert lost[0] == "CheckpointError", lost
    assert "holds no checkpoint, but step_0000004 was saved" in lost[1]


def order_of_writes(rank: int, config: Any) -> list[Any]:
    """What a resume writes, in order, up to run.json."""
    from megatron_lion.train import loop

    written: list[Any] = []

    def describe_run(run: Any) -> None:
        written.append("run.json")
        raise StorageError("enough")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(loop, "keep_settings", lambda config, newest: written.append(newest))
        patch.setattr(loop, "describe_run", describe_run)
        tiny.error_of(loop.pretrain, config)
    return written


def test_the_record_is_written_before_the_id(config: Any) -> None:
    """A job that is killed between the two keeps the rule for runs without an id."""
    assert run_distributed(order_of_writes, 1, config)[0] == [4, "run.json"]


def test_the_record_never_goes_back(config: Any) -> None:
    record = Path(config.run_dir, "newest_checkpoint")
    for newest, expected in ((2, "step_0000004\n"), (None, "step_0000004\n"), (6, "step_0000006\n")):
        keep_settings(config, newest)
        assert record.read_text() == expected
