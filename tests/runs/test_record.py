"""Reading a run folder into a `RunRecord`."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.errors import CheckpointError
from megatron_lion.runs.record import read_run
from megatron_lion.runs.series import Series


def test_a_run_folder_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "lion"))
    assert (run.model, run.optimizer, run.label) == ("gpt2-small", "lion", "LION")
    assert run.num_parameters == 124_475_904
    assert run.last_step == 1000
    assert run.tokens_per_step == 16 * 1024
    assert run.settings["optimizer.lr"] == 1e-3
    assert run.seed == 1234
    assert len(run.series("train/loss").steps) == 100
    assert run.series("perf/mfu") == Series()
    assert [r["step"] for r in run.evaluations] == [200, 400, 600, 800, 1000]
    assert run.training_seconds(1000) == pytest.approx(1000 * 16 * 1024 / 30_000, rel=0.01)
    assert run.training_seconds(500) == pytest.approx(500 * 16 * 1024 / 30_000, rel=0.01)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: p.mkdir(), "not a run folder"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("name: x\n")), "no metrics.jsonl"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: [\n")), "config.yaml: cannot be read"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text("[1]")), "must contain an object"),
        (lambda p: (write_run(p), (p / "eval" / "x.json").write_text("{}")), "not an evaluation result"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path / "it")
    with pytest.raises(CheckpointError, match=says):
        read_run(tmp_path / "it")
