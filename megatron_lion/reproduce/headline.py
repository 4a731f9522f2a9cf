"""The demo's last screen: one row per optimizer, what the numbers show and do not show, and what to do next."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.compare.selection import main_evaluation_key
from megatron_lion.jobs import shown_job, typed_path
from megatron_lion.reproduce.language_claims import ONE_SEED_MARGIN, log_perplexities
from megatron_lion.reproduce.recipes import list_of_one
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord
from megatron_lion.shipped import PACKAGE

WIDTH = 80
COLUMNS = ("optimizer", "rate", "valid loss", "test loss", "ln perplexity", "r/√d")


def headline_table(runs: Sequence[RunRecord]) -> str:
    """The result of each run as plain text of at most 80 columns; a missing value is an en dash.

    Args:
        runs: the runs. Losses and the zero-shot log perplexity (nats per token) are those of the last step, r/√d is that
            of the last probe.
    """
    key = main_evaluation_key(runs)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run in runs:
        valid, test = run.final("valid/loss"), run.final("test/loss")
        ratio = run.series("probe/norm_ratio_over_sqrt_d").last
        numbers = (valid and valid[1], test and test[1], final_perplexity(run, key), ratio)
        shown = ("–" if number is None else f"{number:.3f}" for number in numbers)
        rows.append((_name(run), f"{run.settings.get('optimizer.lr', math.nan):g}", *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{first:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for first, *cells in rows
    )


def final_perplexity(run: RunRecord, key: tuple[object, ...] | None) -> float | None:
    """ln token perplexity of a run's last step under the convention of an evaluation key, or None."""
    return dict(log_perplexities(run, key)).get(run.planned_steps or run.last_step)


def _name(run: RunRecord) -> str:
    return OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)


def explanation(runs: Sequence[RunRecord], *, processes: int, quick: bool = False, paper_rates: bool = False) -> str:
    """What the table shows and what it does not, in lines of at most 80 columns.

    Args:
        runs: the runs of the table.
        processes: data-parallel processes of each training.
        quick: whether the runs had a few steps only.
        paper_rates: whether the runs had the paper's rates instead of tuned ones.
    """
    steps = max(run.planned_steps or run.last_step for run in runs)
    on = f"{processes} processes" if processes > 1 else "one process"
    shows = f"This shows that every step works here, from text to zero-shot perplexity, on {on}."
    if quick:
        return _wrapped(
            f"{shows} It shows nothing about the optimizers: {steps} steps train almost nothing; without --quick there are 400."
        )
    size = f"{max(run.num_parameters or 0 for run in runs) / 1e6:.1f} million parameters"
    rates = "the paper's rates are made for 50,000 steps" if paper_rates else "the paper trains for 50,000"
    key = main_evaluation_key(runs)
    values = {_name(run): value for run in runs if (value := final_perplexity(run, key)) is not None}
    order = sorted(values, key=lambda name: values[name])
    gap = ""
    if len(order) > 1:
        spread = values[order[-1]] - values[order[0]]
        gap = (
            f" {order[-1]} comes last in ln perplexity, {spread:.3f} nats behind {order[0]}; two runs of one setting differed by "
            f"up to {ONE_SEED_MARGIN:g}."
        )
    return _wrapped(
        f"{shows} It does not show which optimizer is better: each has one seed, {size} and {steps} steps; {rates}.{gap}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def next_steps(output: Path, config: str, processes: int) -> str:
    """Where the results are, and commands that continue from them.

    Args:
        output: the demo's folder.
        config: path of the demo's config.
        processes: data-parallel processes of each training.
    """
    sweep = ["--config", config, "--data.path", list_of_one(output / "data"), "--grid", "optimizer.name=lion,adamw",
             "--grid", "optimizer.lr=1e-3,3e-4", "--confirm", "3", "--processes", str(processes),
             "--output", str(output / "sweep")]  # fmt: skip
    commands = {
        "Compare the best setting of each optimizer on fresh seeds: 10 runs as long as those above": [
            shown_job("sweep", sweep)
        ],
        "Train on a text of yours, with a tokenizer of its own": [shown_job("pretrain", ["--text", "FILE.txt"])],
    }
    blocks = [f"{title}:\n" + "\n".join(f"  {line}" for line in lines) for title, lines in commands.items()]
    report, runs = output / "comparison" / "report.html", output / "runs"
    return "\n".join(
        [
            f"All tables and charts, for a browser: {report}",
            f"Runs with settings, metrics, checkpoints and results: {runs}",
            *blocks,
            *_pages(),
        ]
    )


def _pages() -> list[str]:
    """The line that names pages to read; none in an installed package, which has no docs."""
    pages = [PACKAGE.parent / "docs" / name for name in ("first-run.md", "sweeps.md", "data.md")]
    return [f"To read: {', '.join(map(typed_path, pages))}"] if all(page.is_file() for page in pages) else []
