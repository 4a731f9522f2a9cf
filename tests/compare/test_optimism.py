"""The expected optimism of a choice, what a report states about it, and the verdicts that it withholds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.compare.best import Choice, Confirms, best_table, choose_best, selection_notes, unequal
from megatron_lion.compare.optimism import UPPER, Optimism, expected_maximum, pooled_deviation
from megatron_lion.compare.selection import read_runs

REPO = Path(__file__).resolve().parents[2]


def with_losses(folder: Path, valid: float, test: float) -> Path:
    """Sets the final losses of a run."""
    path = folder / "metrics.jsonl"
    with open(path, "a") as stream:
        stream.write(json.dumps({"step": 1000, "valid/loss": valid, "test/loss": test}) + "\n")
    return folder


def grid(
    root: Path, optimizer: str, settings: int, seeds: Sequence[int], best: float = 3.0, apart: float = 0.01
) -> list[Path]:
    """Runs of several rates, of which the middle one is best; test losses of a rate are `apart` from seed to seed."""
    folders = []
    for number in range(settings):
        for place, seed in enumerate(seeds):
            folder = write_run(
                root / f"{optimizer}-{number}-{seed}",
                optimizer=optimizer,
                lr=10.0**-number,
                seed=seed,
                probes=False,
                eval_steps=(),
            )
            folders.append(with_losses(folder, best + abs(number - 1), best + apart * place))
    return folders


def choices(folders: Sequence[Path], **more: Any) -> list[Choice]:
    return choose_best(read_runs(folders), **more)


@pytest.mark.parametrize(
    ("count", "value"),
    [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)),
     (5, 1.1629644736405), (8, 1.4236003060), (100, 2.5075936), (10_000, 3.8516)],
)  # fmt: skip
def test_expected_maximum(count: int, value: float) -> None:
    """Closed forms up to 3, tables of order statistics (Harter 1961) above."""
    assert expected_maximum(count) == pytest.approx(value, rel=1e-4 if count > 8 else 1e-9)


def test_expected_maximum_of_nothing() -> None:
    with pytest.raises(ValueError, match="count = 0: expected at least 1"):
        expected_maximum(0)


def test_further_seeds_of_the_chosen_setting_dilute_its_luck() -> None:
    assert Optimism(tries=8, seeds=1, reported=4).factor == pytest.approx(expected_maximum(8) / 4)
    rng = np.random.default_rng(0)
    luck = rng.normal(size=(20_000, 8, 2))
    best = luck.mean(2).argmin(1)
    chosen = luck[np.arange(len(luck)), best]
    mean = np.concatenate([chosen, rng.normal(size=(len(luck), 3))], axis=1).mean(1)
    assert Optimism(tries=8, seeds=2, reported=5).factor == pytest.approx(
        -mean.mean(), abs=4 * mean.std() / math.sqrt(len(luck))
    )


def test_the_deviation_is_pooled_over_the_settings(tmp_path: Path) -> None:
    folders = grid(tmp_path, "lion", 3, (1, 2))
    (choice,) = choices(folders)
    assert choice.optimism == Optimism(
        tries=3, seeds=2, reported=2, deviation=pytest.approx(0.01 / math.sqrt(2)), measured_by=3
    )
    expected = expected_maximum(3) / math.sqrt(2) * 0.01 / math.sqrt(2)
    (note, upper) = selection_notes([choice])
    assert note == (
        f"LION: best of 3 settings, 2 seeds each: its losses are expected to be up to {expected:.3g} too low (0.60 seed standard "
        "deviations of 0.0071, pooled over 3 settings)"
    )
    assert upper == UPPER
    assert pooled_deviation([]) is None


def test_one_seed_measures_no_deviation_and_one_setting_needs_none(tmp_path: Path) -> None:
    lion, sgd = choices([*grid(tmp_path, "lion", 8, (1,)), *grid(tmp_path, "sgd", 1, (1,))])
    notes = best_table([lion, sgd]).notes
    assert (
        "LION: best of 8 settings, 1 seed each: its losses are expected to be up to 1.4 standard deviations of a run too low; no "
        "setting has a second seed to measure that standard deviation"
    ) in notes
    assert "SGD: 1 setting tried, so its losses are not too low by selection" in notes
    assert UPPER in notes
    assert selection_notes([sgd]) == ["SGD: 1 setting tried, so its losses are not too low by selection"]


def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: Sequence[Path]) -> str:
    words = ["compare", *map(str, folders), "--best", "--no-figures", "--output", str(tmp_path / "out")]
    assert main([*words, "--format", "markdown"]) == 0
    capsys.readouterr()
    return (tmp_path / "out" / "tables.md").read_text() + (tmp_path / "out" / "report.html").read_text()


def test_unequal_chances_get_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lion = grid(tmp_path, "lion", 3, (1, 2, 3))
    other = grid(tmp_path, "sgd", 3, (1, 2, 3), best=4.0)
    shown = compared(tmp_path, capsys, [*lion, *other])
    assert "LION is 1.000 below SGD, outside the noise" in shown, "equal chances"
    assert "no verdict" not in shown
    shown = compared(tmp_path, capsys, [*lion, *other[3:6]])
    assert "outside the noise" not in shown
    assert "below SGD" not in shown
    assert shown.count("no verdict between the best settings, because selection favours them unequally (LION best of 3 by 3 seeds, "
                       "SGD best of 1 by 3 seeds)") == 4, "below the table of the best and the table of seeds"  # fmt: skip
    fewer_seeds = [path for path in other if path.name.endswith("-1")]
    assert "no verdict" in compared(tmp_path, capsys, [*lion, *fewer_seeds]), "as many settings, but fewer seeds"


def test_settings_of_equal_grids_that_diverged_leave_the_verdict(tmp_path: Path) -> None:
    """One of 3 shifts a gap by 0.2 of its standard error, two of 3 by 0.6."""
    folders = [*grid(tmp_path, "lion", 3, (1, 2)), *grid(tmp_path, "sgd", 3, (1, 2))]
    assert unequal(choices(folders[:-2])), "a setting that was not tried, on the other hand, is no equal chance"
    for place, allowed in ((-1, True), (-3, False)):
        path = folders[place] / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 500]
        path.write_text("\n".join([*kept, json.dumps({"step": 503, "optim/skipped_steps": 3})]) + "\n")
        found = choices(folders)
        assert found[0].optimism.tries > found[1].optimism.tries
        assert (unequal(found) == {}) == allowed


def test_a_confirmation_restores_the_verdict(tmp_path: Path) -> None:
    folders = [*grid(tmp_path, "lion", 3, (1,)), *grid(tmp_path, "sgd", 1, (1,))]
    confirmations = {}
    for optimizer, setting in (("lion", "lion-1-1"), ("sgd", "sgd-0-1")):
        rate = 0.1 if optimizer == "lion" else 1.0
        for seed in (8, 9):
            folder = write_run(tmp_path / f"{optimizer}-fresh-{seed}", optimizer=optimizer, lr=rate, seed=seed)
            folders.append(folder)
            confirmations[folder] = Confirms(setting=tmp_path / setting, seeds=(8, 9))
    assert list(unequal(choices(folders[:4]))) == ["gpt2-small"]
    found = choices(folders, confirmations=confirmations)
    assert [[run.seed for run in choice.compared] for choice in found] == [[8, 9], [8, 9]]
    assert [choice.factor for choice in found] == [0.0, 0.0]
    assert unequal(found) == {}
    table = best_table(found)
    assert table.columns[-2:] == ["confirmation", "its valid loss"]
    assert table.rows[0][-2] == "seeds 8, 9"
    assert UPPER not in table.notes
    only_sgd = {folder: of for folder, of in confirmations.items() if "sgd" in folder.name}
    kept = [folder for folder in folders if folder in only_sgd or "fresh" not in folder.name]
    lion, sgd = choices(kept, confirmations=only_sgd)
    assert (lion.confirmation, len(sgd.confirmation)) == ((), 2)
    assert "(LION best of 3 by 1 seed, SGD confirmed)" in unequal([lion, sgd])["gpt2-small"]


def test_the_stated_optimism_is_the_simulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick version of benchmarks/selection_luck.py: all settings are equally good."""
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    from selection_luck import Case, simulate

    rng = np.random.default_rng(0)
    chosen = simulate(Case(tries=(8, 1), seeds=1, split=0.0), 300, rng)
    assert abs(chosen.optimism - 1.424) < 4 * chosen.error
    assert chosen.stated == pytest.approx(1.4236, abs=1e-3)
    assert chosen.wins > 0.75
    several = simulate(Case(tries=(8, 1), seeds=4, split=0.0), 100, rng)
    assert abs(several.optimism - several.stated) < 4 * several.error
    assert several.outside == 0
    confirmed = simulate(Case(tries=(8, 1), seeds=1, confirm=3, split=0.0), 300, rng)
    assert abs(confirmed.optimism) < 4 * confirmed.error
    assert confirmed.stated == 0
    assert abs(confirmed.wins - 0.5) < 0.12
    assert confirmed.outside is not None
    assert confirmed.outside < 0.1
