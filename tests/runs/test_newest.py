"""Which checkpoint is the newest, what `--fall-back` moves aside, and how lost checkpoints are noticed, without training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_lion.configfile import dump_config
from megatron_lion.errors import CheckpointError
from megatron_lion.runs import steps
from megatron_lion.runs.steps import Checkpoint, find_latest, newest_whole


def write(folder: Path, step: int, **changes: Any) -> None:
    tiny.write_manifest(folder, step, run_id="a" * 32, **changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 2, 3 and 4."""
    config = tiny.tiny_config(tmp_path, "corpus", checkpoint__every=2, checkpoint__at_steps=[3])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for step in (2, 3, 4):
        write(folder(tmp_path, step), step)
    (tmp_path / "newest_checkpoint").write_text("step_0000004\n")
    return tmp_path


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def listing(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def intact(found: Checkpoint) -> None:
    pass


def damaged_at(*numbers: int) -> Callable[[Checkpoint], None]:
    def verify(found: Checkpoint) -> None:
        if found.step in numbers:
            raise CheckpointError(f"{found.folder}: a file is damaged")

    return verify


def chosen(run: Path, verify: Callable[[Checkpoint], object] = intact) -> int:
    found = newest_whole(run, verify)
    assert found is not None
    return found.step


def test_nothing_is_moved_if_the_newest_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen(run) == tiny.newest_checkpoint(run).step == 4
    assert listing(run) == ["step_0000002", "step_0000003", "step_0000004"]
    assert capsys.readouterr().err == ""


def test_damaged_ones_are_moved_aside_each_with_its_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def verify(found: Checkpoint) -> None:
        asked.append(found.step)
        damaged_at(3, 4)(found)

    assert chosen(run, verify) == 2
    assert asked == [4, 3, 2]
    assert listing(run) == ["skipped_step_0000003", "skipped_step_0000004", "step_0000002"]
    assert [line.split(": /")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"--fall-back: resuming from step_0000002; moved step_000000{number} to skipped_step_000000{number}"
        for number in (4, 3)
    ]
    assert (run / "newest_checkpoint").read_text() == "step_0000002\n"
    assert tiny.newest_checkpoint(run).step == 2
    assert capsys.readouterr().err == "", "what was passed over on request is no longer missed"


def test_an_older_damaged_one_stays(run: Path) -> None:
    assert chosen(run, damaged_at(2, 3)) == 4
    assert listing(run) == ["step_0000002", "step_0000003", "step_0000004"]


def without_manifest(run: Path) -> str:
    (folder(run, 4) / "manifest.json").unlink()
    return "step_0000004"


def empty_manifest(run: Path) -> str:
    (folder(run, 4) / "manifest.json").write_text("")
    return "step_0000004"


def manifest_is_a_folder(run: Path) -> str:
    (folder(run, 4) / "manifest.json").unlink()
    (folder(run, 4) / "manifest.json").mkdir()
    return "step_0000004"


def other_number(run: Path) -> str:
    write(folder(run, 9), 4)
    return "step_0000009"


def longer_name(run: Path) -> str:
    folder(run, 4).rename(run / "checkpoints" / "step_000000004")
    return "step_000000004"


def shorter_name(run: Path) -> str:
    write(run / "checkpoints" / "step_9", 9)
    return "step_9"


def too_large(run: Path) -> str:
    write(folder(run, 10**12 + 1), 10**12 + 1)
    return f"step_{10**12 + 1}"


NOT_WHOLE = {
    without_manifest: "step_0000004 has no manifest.json: the newest checkpoint is incomplete",
    empty_manifest: "step_0000004/manifest.json: damaged",
    manifest_is_a_folder: "step_0000004 has no manifest.json: the newest checkpoint is incomplete",
    other_number: "step_0000009: holds step 4, but its name is that of step 9",
    longer_name: "step_000000004: not the name of a checkpoint of this run",
    shorter_name: "step_9: not the name of a checkpoint of this run",
    too_large: f"step_{10**12 + 1}: not the name of a checkpoint of this run",
}


@pytest.mark.parametrize("change", NOT_WHOLE)
def test_the_newest_is_refused_or_moved_aside(run: Path, change: Callable[[Path], str]) -> None:
    name = change(run)
    kind, message = tiny.error_of(find_latest, run)
    assert kind == "CheckpointError"
    assert NOT_WHOLE[change] in message
    assert "--fall-back" in message
    whole = 4 if folder(run, 4).is_dir() and name != "step_0000004" else 3
    assert chosen(run) == whole
    assert f"skipped_{name}" in listing(run)
    assert tiny.newest_checkpoint(run).step == whole


def test_what_was_moved_aside_before_is_never_replaced(run: Path) -> None:
    for number in range(3):
        write(folder(run, 4), 4, source=f"attempt {number}")
        assert steps.set_aside(run, "step_0000004") == "skipped_step_0000004" + ("", "-2", "-3")[number]
    os.symlink("nowhere", run / "checkpoints" / "skipped_step_0000003")
    assert steps.set_aside(run, "step_0000003") == "skipped_step_0000003-2"
    for number, end in enumerate(("", "-2", "-3")):
        text = (run / "checkpoints" / f"skipped_step_0000004{end}" / "manifest.json").read_text()
        assert f"attempt {number}" in text
    assert steps.list_steps(run) == [2]


def test_nothing_is_moved_if_none_is_whole(run: Path) -> None:
    before = listing(run)
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint, and moved nothing; .*step_0000004: a file is damaged"
    ):
        newest_whole(run, damaged_at(2, 3, 4))
    assert listing(run) == before
    assert (run / "newest_checkpoint").read_text() == "step_0000004\n"


def emptied(run: Path, *, recorded: bool, logged: str = "") -> None:
    for step in (2, 3, 4):
        (folder(run, step) / "manifest.json").unlink()
        folder(run, step).rmdir()
    if not recorded:
        (run / "newest_checkpoint").unlink()
    (run / "metrics.jsonl").write_text(logged)


def either(run: Path) -> list[Any]:
    """What a plain start and `--fall-back` give."""
    results = []
    for find in (lambda: find_latest(run), lambda: newest_whole(run, intact)):
        kind, message = tiny.error_of(lambda find=find: results.append(find()))
        if kind:
            results.append(f"{kind}: {message}")
    return results


LINE = '{"step": %d, "train/loss": 1.0}\n'


def test_lost_checkpoints_are_no_new_run(run: Path) -> None:
    emptied(run, recorded=True)
    for result in either(run):
        assert result.startswith(
            f"CheckpointError: {run}/checkpoints: holds no checkpoint, but step_0000004 was saved; mount"
        )


@pytest.mark.parametrize(
    ("logged", "lost"),
    [
        ("", False),
        (LINE % 2, False),  # the step of a save is logged before it
        (LINE % 1 + LINE % 3, True),
        (LINE % 4, True),  # due at 2 and 3: the first is named, for the second may have failed
        (LINE % 3 + LINE % 1, True),
        ('{"step": 3, "test/loss": 1.0}\n[3]\n{"step": 3', False),
        ('{"step": "3", "train/loss": 1.0}\n', False),
    ],
)
def test_what_an_earlier_version_lost_is_seen_in_its_metrics(run: Path, logged: str, lost: bool) -> None:
    emptied(run, recorded=False, logged=logged)
    for result in either(run):
        if lost:
            assert "holds no checkpoint, but step_0000002 was saved" in result
        else:
            assert result is None


def test_a_run_with_an_id_kept_a_record_of_every_save(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So if there is no record, nothing was saved, whatever was logged."""
    emptied(run, recorded=False, logged=LINE % 4)
    (run / "run.json").write_text('{"run_id": "%s"}' % ("a" * 32))
    assert either(run) == [None, None]
    line = f"{run}: step 4 is in metrics.jsonl, but no checkpoint was saved yet: starting from step 0\n"
    assert capsys.readouterr().err == line * 2


def test_a_new_run_starts_without_a_word(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emptied(run, recorded=False)
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints").rmdir()
    assert either(run) == [None, None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("recorded", "mentioned"), [("step_0000004", False), ("step_0000003", False), ("step_0000009", True)]
)
def test_a_newer_one_that_was_moved_away_is_mentioned(
    run: Path, capsys: pytest.CaptureFixture[str], recorded: str, mentioned: bool
) -> None:
    (run / "newest_checkpoint").write_text(f"{recorded}\n")
    assert tiny.newest_checkpoint(run).step == 4
    line = f"{run}: {recorded} was saved, but is not in {run / 'checkpoints'}; using step_0000004\n"
    assert capsys.readouterr().err == (line if mentioned else "")
