"""One awkward metrics.jsonl, read by all code that reads runs: each reader must get the same numbers.

EXPECTED was written by hand. Every invalid line has a value that would change a minimum, a mean or an end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from tiny import tiny_config

from megatron_lion.commands import theory as theory_verb
from megatron_lion.compare.best import choose_best
from megatron_lion.compare.budgets import equal_budget_table, loss_tables, target_table
from megatron_lion.compare.panels import panels
from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.seeds import seeds_table
from megatron_lion.compare.selection import read_runs
from megatron_lion.config import RunConfig
from megatron_lion.configfile import save_config
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.rate_claims import rate_claims
from megatron_lion.runs.metrics import MetricsWriter
from megatron_lion.runs.record import read_run
from megatron_lion.runs.series import Series, read_metrics
from megatron_lion.sweep.summary import sweep_tables
from megatron_lion.theory.estimate import estimate_gap
from megatron_lion.theory.rates import rate_constant

KEYS = ("train/loss", "test/loss", "valid/loss", "probe/loss", "probe/grad_l1", "probe/grad_l2", "probe/norm_ratio",
        "probe/kkt_residual", "optim/lr")  # fmt: skip
D, STEPS = 9, 10
EXPECTED = Series((0, 2, 10), (8.0, 4.0, 2.0))


def line(step: int, value: str) -> str:
    return f'{{"step": {step}, "time": 1.5, ' + ", ".join(f'"{key}": {value}' for key in KEYS) + "}"


MIDDLE = [
    line(0, "8"),  # an int is a number
    line(2, "99.0"),  # from before the resume
    line(3, "1.0"),
    line(5, "1.5"),
    "",
    line(7, "1.25") + "\r",
    line(8, "1.125"),
    line(9, "1.0625"),
    line(2, "4.0"),  # steps repeat after a resume, and go back
    line(3, "null"),
    line(5, "NaN"),
    line(6, "true"),
    " \t",
    line(7, "-Infinity"),
    line(8, "true"),
    line(9, '"text"'),
    line(9, "1" + 400 * "0"),  # too large for a float
]
TAILS = {
    "whole": line(10, "2.0") + "\n",
    "no line end": line(10, "2.0"),
    "torn": line(10, "2.0") + "\n" + line(11, "0.5")[:-1],
    "torn in a number": line(10, "2.0") + "\n" + '{"step": 11, "test/loss": 0.',
}


def write_awkward_run(folder: Path, tail: str, seed: int = 1) -> Path:
    folder.mkdir(parents=True)
    config = {"name": "tiny", "seed": seed, "model": {"kind": "gpt2", "seq_length": 8},
              "optimizer": {"name": "lion", "lr": 0.001}, "train": {"steps": STEPS, "global_batch_size": 4}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"num_parameters": D, "optimizer": "lion", "name": "tiny"}))
    (folder / "metrics.jsonl").write_bytes("\n".join([*MIDDLE, TAILS[tail]]).encode())
    return folder


@pytest.fixture(params=list(TAILS))
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Two runs in a sweep's folder, which differ in their seed."""
    return [write_awkward_run(tmp_path / "sweep" / f"seed-{seed}", request.param, seed) for seed in (1, 2)]


def table_rows(table: Any) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_reader(folders: list[Path]) -> None:
    metrics = read_metrics(folders[0] / "metrics.jsonl")
    assert metrics == {**dict.fromkeys(KEYS, EXPECTED), "time": metrics["time"]}
    assert metrics["time"].steps == (0, 2, 3, 5, 6, 7, 8, 9, 10)
    steps, values = metrics["test/loss"].arrays()
    assert (steps.tolist(), values.tolist()) == ([0, 2, 10], [8, 4, 2])
    assert steps.dtype == values.dtype == np.float64


def test_compare(folders: list[Path]) -> None:
    runs = read_runs(folders)
    assert [run.metrics for run in runs] == [read_metrics(folder / "metrics.jsonl") for folder in folders]
    assert [(run.last_step, run.finished, run.valid_loss) for run in runs] == [(10, True, 2.0)] * 2
    assert [run.end_train_loss for run in runs] == [pytest.approx(14 / 3)] * 2
    by_title = {table.slug: table_rows(table) for table in build_tables(runs, target_loss=3.0)}
    # The smoothed curve falls from 4 at step 2 to 2 at step 10.
    assert [row["steps"] for row in by_title["to-target"]] == [pytest.approx(6.0)]


def test_budgets(folders: list[Path]) -> None:
    runs = read_runs(folders)
    tables = {table.slug: table_rows(table) for table in loss_tables(runs)}
    for row in tables["loss-by-step"]:
        assert {key: value for key, value in row.items() if key not in ("model", "optimizer")} == {"2": 4.0, "10": 2.0}
    assert {row["at equal steps"] for row in table_rows(equal_budget_table(runs))} == {2.0}
    assert [row["steps"] for row in table_rows(target_table(runs, 4.5))] == [pytest.approx(1.75)]


def test_best_and_seeds(folders: list[Path]) -> None:
    runs = read_runs(folders)
    (choice,) = choose_best(runs)
    assert (choice.valid_loss, len(choice.runs)) == (2.0, 2)
    table = seeds_table(runs)
    assert table is not None
    (row,) = table_rows(table)
    assert (row["measure"], row["seeds"], row["mean"]) == ("final test loss", 2, 2.0)


def test_figures(folders: list[Path]) -> None:
    drawn = {panel.slug: panel.curves for panel in panels(read_runs(folders[:1]))}
    for slug in ("training-loss", "test-loss", "norm-ratio", "kkt-residual"):
        (curve,) = drawn[slug]
        assert (list(curve.x), list(curve.y)) == ([0, 2, 10], [8, 4, 2]), slug


def test_sweep(folders: list[Path]) -> None:
    folder = folders[0].parent
    save_config(RunConfig(), folder / "base.yaml")
    runs = [
        {"name": path.name, "settings": {"optimizer.name": "lion", "seed": seed}, "last_step": STEPS,
         "settings_sha256": str(seed), "status": "finished", "exit_code": 0}
        for seed, path in enumerate(folders, start=1)
    ]  # fmt: skip
    content = {"format": 1, "config": "tiny.yaml", "base_sha256": "", "grids": [], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(content))
    (table,) = sweep_tables([folder])
    for row in table_rows(table):
        assert (row["valid loss"], row["lowest"], row["at step"]) == (2.0, 2.0, 10)
        assert row["train loss"] == pytest.approx(14 / 3)
        assert (row["status"], row["choice"]) == ("finished", "best")


def test_theory(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    gap = estimate_gap(read_run(folders[0]))
    assert gap is not None
    assert (gap.first_loss, gap.first_step, gap.low, gap.high) == (8.0, 0, 6.0, 8.0)
    parser = ArgumentParser(exit_on_error=False)
    theory_verb.add_arguments(parser)
    theory_verb.run(parser.parse_args([str(folder) for folder in folders]))
    text = capsys.readouterr().out
    rate = rate_constant([0, 2, 10], [8.0, 4.0, 2.0])
    assert f"| c_SGD (‖∇f‖₂) | {rate.value:.4g} | {rate.at} of 11 |" in text
    assert f"| c_LION (‖∇f‖₁/√d) | {rate.value / 3:.4g} | {rate.at} of 11 |" in text
    assert text.count("Δ between 6 (f* = smallest loss probed) and 8 (f* = 0)") == 2
    assert text.count("K = 10, d = 9") == 2


def test_reproduce(folders: list[Path]) -> None:
    claims = rate_claims(Plan("rates", "tiny", "", (), seeds={"lion": folders, "sgd": folders}))
    rate = rate_constant([0, 2, 10], [8.0, 4.0, 2.0])
    assert [claim.ours.split(" [")[0] for claim in claims[::2]] == [f"{rate.value / 3:.3g}", f"{rate.value:.3g}"]


def test_the_writer_of_the_next_job_agrees_with_the_reader(folders: list[Path], tmp_path: Path) -> None:
    """A resume changes no number that was read before; a torn line is removed and does not affect the next line."""
    before = read_metrics(folders[0] / "metrics.jsonl")
    writer = MetricsWriter(folders[0], tiny_config(tmp_path, "no-corpus"), is_main=True)
    assert read_metrics(folders[0] / "metrics.jsonl") == before
    writer.write(12, {"train/loss": 1.0})
    after = read_metrics(folders[0] / "metrics.jsonl")
    assert after["train/loss"] == Series((0, 2, 10, 12), (8.0, 4.0, 2.0, 1.0))
    assert after["test/loss"] == EXPECTED


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: read_run(folder).dimension,
        lambda folder: rate_claims(Plan("rates", "tiny", "", (), seeds={"lion": [folder], "sgd": [folder]})),
    ],
)
def test_theory_needs_the_number_of_parameters(make: Callable[[Path], object], tmp_path: Path) -> None:
    from megatron_lion.errors import CheckpointError

    folder = write_awkward_run(tmp_path / "run", "whole")
    for content in ({}, {"num_parameters": 0}, {"num_parameters": float("nan")}, {"num_parameters": True}):
        (folder / "run.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"neither run.json nor a probe has num_parameters"):
            make(folder)
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 10, "probe/num_parameters": D}) + "\n")
    make(folder)
