"""The choice of an optimizer's best setting, and its notes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.compare.best import best_table, choose_best, run_folders
from megatron_lion.compare.selection import read_runs
from megatron_lion.errors import CheckpointError


def grid(root: Path, rates: dict[float, float], **settings: object) -> list[Path]:
    """Runs of LION whose losses are higher by the offset given for their rate."""
    return [write_run(root / f"lion-{rate:g}", lr=rate, offset=offset, **settings) for rate, offset in rates.items()]


def edit_metrics(folder: Path, *, until: int, add: tuple[dict[str, object], ...] = ()) -> None:
    """Cuts a run's metrics after a step and adds lines."""
    path = folder / "metrics.jsonl"
    kept = [line for line in map(json.loads, path.read_text().splitlines()) if line["step"] <= until]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *add]))


def test_the_lowest_validation_loss_wins_whatever_the_test_loss(tmp_path: Path) -> None:
    folders = grid(tmp_path, {1e-3: 0.2, 3e-4: 0.0, 1e-4: 0.1})
    edit_metrics(folders[2], until=1000, add=({"step": 1000, "test/loss": 0.1},))
    folders += [write_run(tmp_path / "sgd", optimizer="sgd")]
    lion, sgd = choose_best(read_runs(folders))
    assert [run.folder for run in lion.runs] == [folders[1]]
    assert lion.settings == {"optimizer.lr": 3e-4}
    assert (lion.tried, lion.notes) == (3, ()), "inside the grid: no notes"
    assert (sgd.tried, sgd.notes) == (1, ())
    table = best_table([lion, sgd])
    assert table.rows[0][:5] == ["gpt2-small", "LION", "lr=0.0003", 3, 1]
    assert "never by the test loss" in table.notes[0]


@pytest.mark.parametrize(
    ("offsets", "word", "beyond"),
    [((0.0, 0.1, 0.2), "largest", "0.0033"), ((0.2, 0.1, 0.0), "smallest", "3.3e-05")],
)
def test_a_best_rate_at_the_edge_asks_for_a_wider_grid(
    tmp_path: Path, offsets: tuple[float, ...], word: str, beyond: str
) -> None:
    folders = grid(tmp_path, dict(zip((1e-3, 3e-4, 1e-4), offsets, strict=True)))
    (note,) = choose_best(read_runs(folders))[0].notes
    assert f"is the {word} tried" in note
    assert f"widen the grid, for example to {beyond}" in note


def test_a_diverged_neighbour_closes_the_grid_and_an_unfinished_one_does_not(tmp_path: Path) -> None:
    folders = grid(tmp_path, {3e-3: 0.0, 1e-3: 0.0, 3e-4: 0.1})
    edit_metrics(folders[0], until=500)
    notes = choose_best(read_runs(folders))[0].notes
    assert "lr=0.003 left out: not finished, step 500 of 1,000" in notes
    assert any("largest tried" in note for note in notes)
    edit_metrics(folders[0], until=500, add=({"step": 503, "optim/skipped_steps": 3},))
    assert choose_best(read_runs(folders))[0].notes == ("lr=0.003 left out: diverged at step 503",)
    edit_metrics(folders[0], until=990, add=({"step": 1000, "optim/skipped_steps": 3},))
    assert choose_best(read_runs(folders))[0].notes == ("lr=0.003 left out: diverged at step 1,000",), (
        "at its last step"
    )


def test_a_zero_is_no_edge_and_a_loss_that_is_not_finite_is_no_choice(tmp_path: Path) -> None:
    folders = grid(tmp_path, {1e-3: 0.0, 3e-4: 0.1, 1e-4: 0.2})
    edit_metrics(folders[0], until=1000, add=({"step": 1000, "valid/loss": None},))
    choice = choose_best(read_runs(folders))[0]
    assert choice.settings == {"optimizer.lr": 3e-4}
    assert "lr=0.001 left out: no finite validation loss at its end" in choice.notes
    for folder, decay in zip(folders, (0.0, 0.1, 0.2), strict=True):
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("weight_decay: 0.01", f"weight_decay: {decay}"))
    edit_metrics(folders[0], until=1000, add=({"step": 1000, "valid/loss": 1.0},))
    (note,) = choose_best(read_runs(folders))[0].notes
    assert "optimizer.lr" in note, "weight_decay 0 cannot be lower"


def test_seeds_are_one_setting_and_are_compared_where_all_have_them(tmp_path: Path) -> None:
    """Two more seeds of the best, both worse, do not change the choice: settings are compared over common seeds."""
    folders = [write_run(tmp_path / f"a{seed}", lr=1e-3, seed=seed, offset=0.5 * (seed > 1)) for seed in (1, 2, 3)]
    folders += [
        write_run(tmp_path / "b1", lr=3e-4, seed=1, offset=0.1),
        write_run(tmp_path / "c1", lr=3e-3, seed=1, offset=0.1),
    ]
    choice = choose_best(read_runs(folders))[0]
    assert [run.folder.name for run in choice.runs] == ["a1", "a2", "a3"]
    assert choice.valid_loss == pytest.approx(read_runs(folders)[0].valid_loss)
    other = write_run(tmp_path / "d9", lr=1e-4, seed=9)
    choice = choose_best(read_runs([*folders, other]))[0]
    assert [run.folder.name for run in choice.runs] == ["d9"]
    assert any("share no seed" in note for note in choice.notes)


def test_compare_best_of_plain_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = grid(tmp_path, {1e-3: 0.2, 3e-4: 0.0, 1e-4: 0.1})
    folders += [write_run(tmp_path / f"sgd{seed}", optimizer="sgd", seed=seed) for seed in (1, 2)]
    output = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--best", "--output", str(output), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "### The best setting of each optimizer by validation loss" in shown
    assert "| gpt2-small | LION | lr=0.0003 | 3 | 1 |" in shown
    assert "lr=0.001" not in shown
    losses = (output / "losses.csv").read_text().splitlines()
    assert len(losses) == 4, "LION once, SGD with both seeds"
    assert (output / "seeds.csv").exists()
    assert (output / "gpt2-small-learning-rate.png").exists(), "all rates tried"


def test_compare_best_refuses_what_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    edit_metrics(folder, until=100)
    assert main(["compare", str(folder), "--best", "--output", str(tmp_path / "out")]) == 4
    assert "none of the 1 runs is finished" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_stands_for_its_runs(tmp_path: Path) -> None:
    begun, plain = write_run(tmp_path / "sweep" / "a"), write_run(tmp_path / "plain")
    path = tmp_path / "sweep" / "sweep.json"
    path.write_text(json.dumps({"runs": [{"name": "a"}, {"name": "later"}]}))
    assert run_folders([tmp_path / "sweep", plain]) == [begun, plain]
    path.write_text(json.dumps({"runs": [{"name": "later"}]}))
    with pytest.raises(CheckpointError, match="none of the sweep's 1 runs has begun"):
        run_folders([tmp_path / "sweep"])
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"sweep\.json: damaged"):
        run_folders([tmp_path / "sweep"])
