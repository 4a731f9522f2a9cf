"""The sharpest fault cases with a few of their faults; `make test-full` injects all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import rows
from faults.lab import Lab, digest
from faults.warm import Warm, warm

QUICK = {
    "start-kill": 3, "start-enospc": 3, "save-kill": 3, "save-half": 2, "save-enospc": 3, "retention-kill": 2, "logs-enospc": 2,
    "power-strict": 3, "power-names": 3, "power-histories": 2, "peer-kill-dp2": 3, "signal-term": 3, "signal-hup": 2,
    "nonfinite-state": 1, "checkpoint-identity": 6, "checkpoint-manifest": 5, "index-cache": 4, "index-mutations": 20,
    "dataset-flips": 5, "hostile-run": 4, "hostile-hub": 3,
}  # fmt: skip
"""Cases, and how many of their faults are injected here, evenly spaced."""
# Others of their family are not slow: save-kill, power-strict; and test_a_killed_rank_is_named_at_once.
SLOW = ("save-half", "retention-kill", "power-histories", "peer-kill-dp2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with warm(tmp_path_factory.mktemp("output")) as started:
        yield started


@pytest.fixture(scope="module")
def lab(server: Warm, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One laboratory for all cases: those with equal settings share their twin."""
    return Lab(tmp_path_factory.mktemp("lab"), server)


@pytest.mark.timeout(1800)  # each fault is two runs, and a loaded machine is ten times slower
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in QUICK])
def test_some_faults_of_a_case(lab: Lab, name: str) -> None:
    lab.limit = QUICK[name]
    row = rows.run_case(rows.all_cases()[name], lab)
    assert row["passed"], row["failures"]
    assert row["recovered"] + row["open"] == row["injected"] > 0


@pytest.mark.full
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("name", list(rows.all_cases()))
def test_all_faults_of_a_case(server: Warm, tmp_path: Path, name: str) -> None:
    row = rows.run_case(rows.all_cases()[name], Lab(tmp_path, server))
    assert row["passed"], row["failures"]


def test_what_a_checkpoint_relies_on_is_durable_before_it(lab: Lab) -> None:
    """The log lines of its steps: otherwise a power cut leaves a gap, as a resumed run does not write them again."""
    config = lab.config("lines", train__steps=4, checkpoint__every=2)
    calls = lab.calls(config)
    commits = [call for call in calls if call.op == "rename" and call.path[-12:] in ("step_0000002", "step_0000004")]
    assert len(commits) == 2
    for commit in commits:
        before = [call.op for call in calls if call.number < commit.number and call.path.endswith("/metrics.jsonl")]
        assert before[-1] == "fsync"
        assert before.count("write") == int(commit.path[-1])
    # The entry of the folder of checkpoints, too, or the first checkpoint is lost with it.
    made = next(call.number for call in calls if call.op == "mkdir" and call.path.endswith("/checkpoints"))
    flushed = [call.number for call in calls if call.op == "fsync" and call.path == config.run_dir]
    assert any(made < number < commits[0].number for number in flushed)


def test_the_verdict_sees_one_changed_bit(lab: Lab) -> None:
    """A finished run is not trained again, so that a bit of its last checkpoint stays what a fault made it."""
    tally = rows.Tally()
    config = lab.config("bit", train__steps=2)
    assert [rank.code for rank in lab.run(config).ranks] == [0]
    assert digest(config.run_dir, 2) == lab.twin(config).digest
    (path,) = Path(config.run_dir, "checkpoints", "step_0000002").glob("rng_*")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert lab.judge(tally, "a bit", config) in ("silent", "stuck")
    assert not tally.passed
