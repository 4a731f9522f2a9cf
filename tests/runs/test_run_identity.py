"""Each condition that ties a checkpoint to its step, its run and its settings, alone and without training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_lion.configfile import dump_config
from megatron_lion.errors import CheckpointError
from megatron_lion.runs import identity

OURS, OTHERS = "a" * 32, "b" * 32
STATE: dict[str, Any] = {
    "consumed_samples": 24, "seed": 1234, "state_layout": "dp_reshardable", "optimizer": "lion", "precision": "fp32",
    "buckets": None, "state_fingerprint": "1" * 32, "optimizer_state": {"num_steps": 3, "num_skipped": 0},
}  # fmt: skip


def seal(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an id and the settings of a tiny run of 5 steps of 8 samples, seed 1234."""
    (tmp_path / "config.yaml").write_text(dump_config(tiny.tiny_config(tmp_path, "corpus")))
    seal(tmp_path / "run.json", {"run_id": OURS})
    return tmp_path


def saved(run: Path, step: int = 3, **changes: Any) -> Path:
    content = {**STATE, "consumed_samples": 8 * step, "run_id": OURS, **changes}
    return tiny.write_manifest(
        run / "checkpoints" / f"step_{step:07d}",
        step,
        **{key: value for key, value in content.items() if value is not ...},
    )


def settings(run: Path, **changes: Any) -> dict[str, Any]:
    found = identity.deciding_settings(tiny.tiny_config(run, "corpus", **changes))
    assert found["seed"] == 1234
    return found


def checked(run: Path, folder: Path, step: int = 3) -> tuple[str, str]:
    return tiny.error_of(identity.check_identity, identity.read_manifest(folder), folder, run, step)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 4}, "holds step 4, but its name is that of step 3"),
        ({"run_id": OTHERS}, f"belongs to another run (run id {OTHERS[:12]}, this run is {OURS[:12]})"),
        ({"seed": 99}, "other settings (seed: 99, now 1234)"),
        ({"consumed_samples": 7}, "consumed_samples 7, but 3 steps of 8 samples were taken"),
    ],
)
def test_one_difference_is_enough(run: Path, changes: dict[str, Any], said: str) -> None:
    whole, wrong = saved(run), tiny.write_manifest(run / "wrong", **{"step": 3, **STATE, "run_id": OURS, **changes})
    assert checked(run, whole) == ("", "")
    kind, message = checked(run, wrong)
    assert kind == "CheckpointError"
    assert said in message


def test_a_step_beyond_the_last_one(run: Path) -> None:
    assert checked(run, saved(run, 5), 5) == ("", "")
    kind, message = checked(run, saved(run, 6), 6)
    assert kind == "CheckpointError"
    assert "(step 6 is beyond train.steps 5)" in message


def test_settings_that_the_checkpoint_lacks_have_their_default(run: Path) -> None:
    """They are newer than the version that saved it, which did what the default does."""
    default, ours = identity.RunConfig().optimizer.lr, 1e-3
    assert default != ours
    kept = settings(run)
    assert checked(run, saved(run, settings=kept)) == ("", "")
    newer = {key: value for key, value in kept.items() if key != "model.gelu"}
    assert len(newer) == len(kept) - 1
    assert identity.RunConfig().model.gelu == kept["model.gelu"]
    assert checked(run, saved(run, settings=newer)) == ("", "")
    lacking = {key: value for key, value in kept.items() if key != "optimizer.lr"}
    assert f"(optimizer.lr: {default}, now {ours})" in checked(run, saved(run, settings=lacking))[1]
    other = {**kept, "optimizer.lr": 5e-3}
    assert f"(optimizer.lr: 0.005, now {ours})" in checked(run, saved(run, settings=other))[1]


def test_weights_alone_may_come_from_any_training(run: Path) -> None:
    others = settings(run, optimizer__lr=5e-3)
    weights = tiny.write_manifest(run / "weights", 3, run_id=OURS, settings=others, seed=99, consumed_samples=7)
    assert checked(run, weights) == ("", "")
    assert checked(run, saved(run, settings=others))[0] == "CheckpointError"


@pytest.mark.parametrize(("theirs", "rank", "lines"), [(OURS, 0, 0), (..., 0, 1), (..., 1, 0)])
def test_a_checkpoint_without_an_id_is_reported_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], theirs: Any, rank: int, lines: int
) -> None:
    monkeypatch.setattr(identity, "rank_from_env", lambda: rank)
    for _ in range(2):
        assert checked(run, saved(run, run_id=theirs)) == ("", "")
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith(f"{run}: has checkpoints without a run id")]) == lines
    assert len(said) == lines


@pytest.mark.parametrize("found", ["a" * 31, "a" * 33, "A" * 32, "g" * 32, 7, ["a"] * 32])
def test_an_id_of_another_form_is_refused(run: Path, found: Any) -> None:
    seal(run / "run.json", {"run_id": found})
    with pytest.raises(CheckpointError, match=r"run\.json: run_id must be 32 hexadecimal digits; move it away"):
        identity.read_run_id(run)


def settle(run: Path, **flags: bool) -> str:
    folders = sorted((run / "checkpoints").glob("step_*"))
    return identity.settle_run_id(run, folders, **{"fresh": False, **flags})


def test_a_run_that_has_an_id_keeps_it(run: Path) -> None:
    saved(run, 2, run_id=OTHERS)
    for flags in ({}, {"fresh": True}, {"fall_back": True}):
        assert settle(run, **flags) == OURS
    assert identity.read_manifest(run / "checkpoints" / "step_0000002")["run_id"] == OTHERS


def without(run: Path) -> None:
    pass


def damaged(run: Path) -> None:
    (saved(run, 4) / "manifest.json").write_text("{")


def of_an_earlier_version(run: Path) -> None:
    saved(run, 4, run_id=...)


@pytest.mark.parametrize("also", [without, damaged, of_an_earlier_version])
def test_a_lost_id_is_that_of_the_checkpoints(run: Path, also: Callable[[Path], None]) -> None:
    (run / "run.json").unlink()
    saved(run, 2)
    saved(run, 3)
    also(run)
    assert settle(run) == settle(run, fall_back=True) == OURS


def test_checkpoints_of_two_runs_give_no_id_but_to_a_fall_back(run: Path) -> None:
    (run / "run.json").unlink()
    saved(run, 2, run_id=OURS)
    saved(run, 3, run_id=OTHERS)
    with pytest.raises(
        CheckpointError, match="has no run id, and step_0000002 and step_0000003 belong to different runs"
    ):
        settle(run)
    assert settle(run, fall_back=True) == OTHERS


@pytest.mark.parametrize("flags", [{}, {"fall_back": True}, {"fresh": True}])
def test_a_new_id_is_made_if_there_is_none(run: Path, flags: dict[str, bool]) -> None:
    (run / "run.json").unlink()
    saved(run, 2, run_id=...)
    made = {settle(run, **flags) for _ in range(2)}
    assert len(made) == 2
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in made)


def test_a_fresh_start_takes_the_imported_weights_into_the_new_run(run: Path) -> None:
    (run / "run.json").unlink()
    saved(run, 0, run_id=OTHERS)
    made = settle(run, fresh=True)
    assert made not in (OURS, OTHERS)
    assert identity.read_manifest(run / "checkpoints" / "step_0000000")["run_id"] == made
