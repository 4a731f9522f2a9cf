"""The confirmation of a sweep's choice on fresh seeds: planning with fake runs, and one real sweep."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import config_file, need_sweep, statuses

from megatron_lion.cli import main
from megatron_lion.compare.best import Choice
from megatron_lion.jobs import Jobs
from megatron_lion.sweep.confirm import fresh_seeds
from megatron_lion.sweep.summary import choices_of, read_records
from megatron_lion.sweep.sweep_file import Entry, Sweep, read_sweep

REPO = Path(__file__).resolve().parents[2]
BOTH = ["--grid", "optimizer.name=lion,sgd", "--grid", "lion:optimizer.lr=1,2", "--grid", "sgd:optimizer.lr=3"]
CONFIRMED = ["lion-lr1-confirm-seed1235", "lion-lr1-confirm-seed1236"]


def words_of(tmp_path: Path, corpus: str, *grid: str) -> list[str]:
    return ["sweep", str(config_file(tmp_path, corpus)), *grid, "--output", str(tmp_path / "s")]


def lion(folder: Path) -> Choice:
    """The choice of the first optimizer of a sweep."""
    sweep = need_sweep(folder)
    return choices_of(sweep, read_records(sweep))[0]


def names(choice: Choice, which: str = "confirmation") -> list[str]:
    return [run.folder.name for run in getattr(choice, which)]


def entry(name: str, confirms: str | None = None, **settings: Any) -> Entry:
    return Entry(name=name, settings=settings, last_step=1, settings_sha256=name, confirms=confirms)


def test_fresh_seeds_are_the_smallest_that_no_grid_run_has() -> None:
    sweep = Sweep(folder=Path("s"), config="c", base_sha256="", runs=[entry("a"), entry("b", seed=12)])
    assert fresh_seeds(sweep, 10, 4) == (11, 13, 14, 15)
    sweep.runs += [entry("c", confirms="a", seed=11), entry("d", seed=13)]
    assert fresh_seeds(sweep, 10, 4) == (11, 14, 15, 16), "the seeds of a confirmation remain fresh"


def test_each_choice_is_trained_on_fresh_seeds_once(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path, corpus, *BOTH)
    pretended["losses"] = {"lion-lr1-confirm-seed1235": 1.5, "lion-lr1-confirm-seed1236": 1.7}
    assert main([*words, "--confirm", "2", "--format", "csv"]) == 0
    grid = ["lion-lr1", "lion-lr2", "sgd-lr3"]
    fresh = [*CONFIRMED, "sgd-lr3-confirm-seed1235", "sgd-lr3-confirm-seed1236"]
    assert pretended["ran"] == [*grid, *fresh]
    shown = capsys.readouterr()
    assert "confirmation: the best setting of LION and SGD on the seeds 1235, 1236, 4 to run" in shown.err
    assert "[4/4] sgd-lr3-confirm-seed1236" in shown.err
    line = shown.err.splitlines()[-1]
    assert line.startswith(
        f"compare the best on the confirmation seeds 1235, 1236: megatron-lion compare {tmp_path}/s --best"
    )
    rows = [row.split(",")[2::6] for row in shown.out.splitlines()[1:]]
    assert rows == [["1234", "best"], ["1235", "confirmation"], ["1236", "confirmation"], ["1234", ""],
                    ["1234", "best"], ["1235", "confirmation"], ["1236", "confirmation"]]  # fmt: skip
    assert "LION: confirmed on seeds 1235, 1236" in (tmp_path / "s" / "table.md").read_text()
    assert "validation loss 1.6000" in (tmp_path / "s" / "table.md").read_text()
    assert need_sweep(tmp_path / "s").confirm_seeds == [1235, 1236]
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["format"] == 2
    pretended["ran"] = []
    assert main([*words, "--confirm", "2"]) == 0
    assert main(words) == 0
    assert pretended["ran"] == []
    assert names(lion(tmp_path / "s")) == CONFIRMED, "a command without --confirm keeps the confirmation"
    assert main([*words, "--confirm", "3"]) == 0
    assert pretended["ran"] == ["lion-lr1-confirm-seed1237", "sgd-lr3-confirm-seed1237"]


def test_confirmation_runs_never_take_part_in_choosing(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A better setting changes the choice, lucky or unlucky confirmation runs do not; the old runs stay, unused."""
    words = words_of(tmp_path, corpus)
    pretended["losses"] = {"lion-lr1-confirm-seed1235": 9.0, "lion-lr1-confirm-seed1236": 0.01}
    assert main([*words, "--grid", "optimizer.lr=1,2", "--confirm", "2"]) == 0
    choice = lion(tmp_path / "s")
    assert (choice.valid_loss, choice.tried, names(choice, "runs")) == (1.0, 2, ["lion-lr1"])
    more = ["--grid", "optimizer.lr=0.5,2"]
    assert main([*words, *more]) == 0
    assert "the choice has changed since" in str(lion(tmp_path / "s").unconfirmed)
    assert "not confirmed: its confirmation runs have another setting" in capsys.readouterr().out
    pretended["ran"] = []
    assert main([*words, *more, "--confirm", "2"]) == 0
    assert pretended["ran"] == ["lion-lr0.5-confirm-seed1235", "lion-lr0.5-confirm-seed1236"]
    assert names(lion(tmp_path / "s")) == pretended["ran"]
    assert set(CONFIRMED) < set(statuses(tmp_path / "s"))
    assert (tmp_path / "s" / "table.csv").read_text().count('"confirmation, not used"') == 2


@pytest.mark.slow
def test_the_confirmation_waits_for_every_grid_run(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path, corpus)
    pretended["codes"] = {"lion-lr2": -9}
    assert main([*words, "--grid", "optimizer.lr=1,2", "--confirm", "2"]) == 8
    assert pretended["ran"] == ["lion-lr1", "lion-lr2"]
    assert "1 run of the grid is not finished; the same command continues" in capsys.readouterr().err
    assert main([*words, "--grid", "optimizer.lr=1", "--confirm", "2"]) == 8, "the failed run is reported again"
    assert "other --grid flags planned lion-lr2" in capsys.readouterr().err
    assert main([*words, "--grid", "optimizer.lr=1", "--confirm", "2", "--print"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, "nothing to do" in shown.err) == ("", False), "another command has something to do"
    assert pretended["ran"] == ["lion-lr1", "lion-lr2"]
    pretended["codes"] = {"lion-lr2": 6}
    assert main([*words, "--grid", "optimizer.lr=1,2", "--confirm", "2"]) == 0, "a diverged run has its result"
    assert pretended["ran"][3:] == CONFIRMED


@pytest.mark.slow
def test_failed_and_diverged_confirmation_runs(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(tmp_path, corpus, "--grid", "optimizer.lr=1,2"), "--confirm", "2"]
    pretended["codes"] = {CONFIRMED[0]: -9}
    assert main(words) == 8
    assert f"1 of 4 runs failed: {CONFIRMED[0]}" in capsys.readouterr().err
    assert lion(tmp_path / "s").unconfirmed == "1 of its 2 confirmation runs are finished; repeat `sweep … --confirm`"
    pretended.update(codes={CONFIRMED[0]: 6}, ran=[])
    assert main(words) == 0
    assert pretended["ran"] == [CONFIRMED[0]]
    shown = capsys.readouterr()
    assert (
        "LION: not confirmed: 1 of its 2 confirmation runs diverged: the choice is not stable over seeds" in shown.out
    )
    assert "compare the best (not confirmed" in shown.err
    assert names(lion(tmp_path / "s"), "compared") == ["lion-lr1"]
    assert main(["compare", *(str(tmp_path / "s" / name) for name in CONFIRMED), "--best"]) == 4
    assert "all runs are confirmation runs, which take no part in a choice" in capsys.readouterr().err
    pretended.update(codes={}, ran=[])
    assert main([*words, "--retry-diverged"]) == 0
    assert pretended["ran"] == [CONFIRMED[0]]
    assert names(lion(tmp_path / "s")) == CONFIRMED


@pytest.mark.slow
def test_a_grid_that_takes_a_seed_of_the_confirmation_makes_it_stale(
    tmp_path: Path, corpus: str, pretended: dict[str, Any]
) -> None:
    """The run is not trained twice, and from then on takes part in choosing; another fresh seed replaces it."""
    words = words_of(tmp_path, corpus)
    assert main([*words, "--grid", "optimizer.lr=1,2", "--confirm", "2"]) == 0
    pretended["ran"] = []
    seeds = [*words, "--grid", "optimizer.lr=1,2", "--grid", "seed=1234,1235"]
    assert main(seeds) == 0
    assert pretended["ran"] == ["lion-lr2-seed1235"]
    choice = lion(tmp_path / "s")
    assert names(choice, "runs") == ["lion-lr1", CONFIRMED[0]]
    assert "the grid has run its confirmation's seed 1235 since" in str(choice.unconfirmed)
    assert main([*seeds, "--confirm", "2"]) == 0
    assert pretended["ran"][1:] == ["lion-lr1-confirm-seed1237"]
    assert names(lion(tmp_path / "s")) == [CONFIRMED[1], "lion-lr1-confirm-seed1237"]


@pytest.mark.slow
def test_a_signal_before_the_confirmation_stops_the_sweep(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(tmp_path, corpus, "--grid", "optimizer.lr=1,2"), "--confirm", "2"]
    pretended["interrupted"] = "lion-lr2"
    assert main(words) == 75
    assert (
        "stopped before the confirmation, 2 of 4 runs are finished; the same command continues"
        in capsys.readouterr().err
    )
    pretended.update(interrupted=CONFIRMED[0], ran=[])
    assert main(words) == 75
    pretended["interrupted"] = CONFIRMED[1]
    assert main(words) == 0, "the last run of the sweep finished"
    assert pretended["ran"] == CONFIRMED
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.slow
def test_how_runs_are_made_may_differ_between_grid_and_confirmation(
    tmp_path: Path, corpus: str, pretended: dict[str, Any]
) -> None:
    words = words_of(tmp_path, corpus, "--grid", "optimizer.lr=1,2")
    assert main(words) == 0
    assert main([*words, "--train.micro_batch_size", "2", "--confirm", "2"]) == 0
    assert names(lion(tmp_path / "s")) == CONFIRMED


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) for form in ("--print", "--slurm", "--dry-run")]
)
def test_scripts_and_the_dry_run_plan_the_confirmation_once_the_choice_is_known(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    words = [*words_of(tmp_path, corpus, *BOTH), "--confirm", "2"]

    def written() -> tuple[str, str]:
        assert main([*words, form]) == 0
        shown = capsys.readouterr()
        script = tmp_path / "s" / "sweep.sbatch"
        return (script.read_text() if script.exists() else shown.out), shown.out + shown.err

    text, shown = written()
    assert "lion-lr2" in text
    assert "confirm-seed" not in text
    assert "confirmation: planned once the choice is known; 3 runs of the grid are not finished" in shown
    if form == "--dry-run":
        assert "then at most 2 seeds × 2 optimizers: 2,048 tokens" in shown
    assert main(words[:-2]) == 0
    capsys.readouterr()
    text, shown = written()
    if form == "--dry-run":
        assert "lion-lr1-confirm-seed1236                waiting" in text
        assert "4 to run, one after another: 2,048 tokens at most" in text
        assert need_sweep(tmp_path / "s").confirm_seeds == [], "nothing is written"
    else:
        assert "lion-lr2" not in text
        assert text.count("--optimizer.name lion --optimizer.lr 1.0 --seed 123") == 2
    assert pretended["ran"] == ["lion-lr1", "lion-lr2", "sgd-lr3"]


@pytest.mark.slow
def test_files_of_earlier_versions_and_damaged_ones(
    tmp_path: Path, corpus: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path, corpus, "--grid", "optimizer.lr=1,2")
    assert main(words) == 0
    path = tmp_path / "s" / "sweep.json"
    content = json.loads(path.read_text())
    assert content["format"] == 1, "without a confirmation, earlier versions read the file"
    assert "confirm_seeds" not in content
    assert all("confirms" not in run for run in content["runs"])
    assert main([*words, "--confirm", "2"]) == 0
    content = json.loads(path.read_text())
    for damage in ({"confirm_seeds": ["a"]}, {"confirm_seeds": 3}):
        path.write_text(json.dumps({**content, **damage}))
        assert main(words) == 4
    content["runs"][-1]["confirms"] = "../elsewhere"
    path.write_text(json.dumps(content))
    assert main(words) == 4
    assert capsys.readouterr().err.count("sweep.json: damaged") == 3
    folders = [str(tmp_path / "s" / name) for name in pretended["ran"]]
    assert main(["compare", *folders, "--best", "--no-figures", "--output", str(tmp_path / "comparison")]) == 0
    assert "which runs confirm a choice is not known" in capsys.readouterr().err
    for number in ("1", "-2"):
        assert main([*words, "--confirm", number]) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)  # processes that import torch, on whatever else the machine does
def test_a_real_sweep_is_confirmed_and_compared(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [
        "--grid",
        "optimizer.name=lion,sgd",
        "--grid",
        "lion:optimizer.lr=1e-2,1e-3",
        "--grid",
        "sgd:optimizer.lr=0.3",
    ]
    words = [*words_of(tmp_path, corpus, *grid), "--confirm", "2"]
    command = [sys.executable, "-m", "megatron_lion"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "s"
    assert set(statuses(folder).values()) == {"finished"}
    assert len(statuses(folder)) == 7
    choice = lion(folder)
    assert [run.seed for run in choice.confirmation] == [1235, 1236]
    assert {run.settings["optimizer.lr"] for run in choice.confirmation} == {choice.runs[0].settings["optimizer.lr"]}
    losses = {run.valid_loss for run in (*choice.runs, *choice.confirmation)}
    assert len(losses) == 3, "other seeds give other losses"
    line = next(
        line for line in done.stderr.splitlines() if line.startswith("compare the best on the confirmation seeds")
    )
    compare = line.partition(": megatron-lion ")[2].split()
    monkeypatch.setattr(Jobs, "run", None)
    assert main([*compare, "--no-figures"]) == 0
    rows = (folder / "comparison" / "losses.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["LION seed=1235", "LION seed=1236", "SGD seed=1235", "SGD seed=1236"]
    capsys.readouterr()
    for best in ([], ["--best"]):
        assert main(["compare", str(folder), *best, "--no-figures", "--output", str(tmp_path / "all")]) == 0
        assert ("a setting's seeds include those that it was chosen by" in capsys.readouterr().out) == (not best)
    assert read_sweep(folder) is not None
