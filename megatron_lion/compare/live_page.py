"""A page of runs that are still training: their state in numbers and their curves, from the run folders alone.

The page has no script. It asks the browser to load it again while a run trains.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from megatron_lion.compare.best import run_folders
from megatron_lion.compare.chart import Curve, Panel
from megatron_lion.compare.html_report import STYLE
from megatron_lion.compare.labels import by_model, loss_unit
from megatron_lion.compare.panels import LOG_RANGE, lines_of, panels
from megatron_lion.compare.selection import read_runs
from megatron_lion.compare.svg_charts import chart
from megatron_lion.compare.table import MISSING
from megatron_lion.errors import MegatronLionError
from megatron_lion.plain_text import plain
from megatron_lion.runs.paths import has_begun, metrics_file
from megatron_lion.runs.record import RunRecord

RECENT = 10
"""Number of log lines over which loss and throughput are averaged."""
QUIET_S = 120.0
"""A run without a new log line for this time, or for ten of its usual intervals if that is longer, may have ended."""
LIVE_STYLE = """
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 14px; margin-top: 16px; }
.run { padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.run h3 { margin: 0; overflow-wrap: anywhere; } .run p { margin: 2px 0 8px; color: var(--soft); overflow-wrap: anywhere; }
.run .bar { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }
.run .bar div { height: 100%; background: var(--c); }
.run dl { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 14px; margin: 8px 0 0; }
.run dt { color: var(--soft); font-size: 0.8rem; } .run dd { margin: 0; font-variant-numeric: tabular-nums; }
.problem { padding: 8px 12px; border: 1px solid var(--line); border-radius: 8px; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class Live:
    """The state of one run.

    Attributes:
        run: its record.
        state: "training", "finished", "diverged", or how long it has written nothing.
        facts: (name, text) pairs in the order of the page.
    """

    run: RunRecord
    state: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the folders hold at one moment.

    Attributes:
        runs: the runs that have metrics.
        waiting: the folders without metrics.
        problem: why the runs could not be read, or "".
    """

    runs: list[Live]
    waiting: list[Path]
    problem: str = ""

    @property
    def over(self) -> bool:
        """Whether every run has finished or diverged, so that the page cannot change any more."""
        return (
            bool(self.runs) and not self.waiting and all(live.state in ("finished", "diverged") for live in self.runs)
        )


def snapshot(folders: Sequence[str | Path], now: float | None = None) -> Snapshot:
    """Reads the runs as they are now; a folder that does not exist yet or has no metrics is waited for.

    Args:
        folders: run folders; a sweep folder means its runs.
        now: the time in seconds since 1970; default: the clock.
    """
    waiting: list[Path] = []
    try:
        found = run_folders(folders)
        waiting = [folder for folder in found if not has_begun(folder)]
        records = read_runs([folder for folder in found if folder not in waiting]) if len(waiting) < len(found) else []
    except MegatronLionError as error:
        return Snapshot(runs=[], waiting=waiting, problem=str(error))
    return Snapshot(runs=[_live(run, time.time() if now is None else now) for run in records], waiting=waiting)


def _live(run: RunRecord, now: float) -> Live:
    state = _state(run, now)
    left = _seconds_left(run) if state == "training" else None
    end = (
        f"{duration(left)}, about {time.strftime('%Y-%m-%d %H:%M', time.localtime(now + left))}"
        if left is not None
        else MISSING
    )
    ratio, low, high, root = (
        run.series(f"probe/{name}").last
        for name in ("norm_ratio_over_sqrt_d", "norm_ratio_low", "norm_ratio_high", "sqrt_d")
    )
    bounds = (
        f" ({low / root:.3f} to {high / root:.3f} without noise)"
        if low is not None and high is not None and root
        else ""
    )
    losses = run.series("train/loss").values[-RECENT:]

    def last(key: str, form: str, unit: str = "") -> str:
        value = run.series(key).last
        return MISSING if value is None else format(value, form) + unit

    rates = run.series("perf/tokens_per_s").values[-RECENT:]
    facts = [
        ("training loss", f"{fmean(losses):.4f}" if losses else MISSING),
        ("validation loss", last("valid/loss", ".4f")),
        ("r / √d", (f"{ratio:.3f}" if ratio is not None else MISSING) + bounds),
        ("learning rate", last("optim/lr", ".3g")),
        ("tokens/s", f"{median(rates):,.0f}" if rates else MISSING),
        ("memory", last("memory/max_gib", ".2f", " GiB")),
        ("skipped steps", last("optim/skipped_steps", ",.0f")),
        ("time left", end),
    ]
    return Live(run=run, state=state, facts=facts)


def _state(run: RunRecord, now: float) -> str:
    if run.diverged:
        return "diverged"
    if run.planned_steps is not None and run.finished:
        return "finished"
    try:
        quiet = now - metrics_file(run.folder).stat().st_mtime
    except OSError:
        return "no metrics"
    interval = _seconds_a_line(run)
    return "training" if quiet < max(QUIET_S, 10 * (interval or 0.0)) else f"no new line for {duration(quiet)}"


def _seconds_a_line(run: RunRecord) -> float | None:
    """Typical time between two log lines, of training steps alone."""
    steps, rate = run.series("perf/tokens_per_s").steps, run.tokens_per_s
    if len(steps) < 2 or not rate or run.tokens_per_step is None:
        return None
    return (steps[-1] - steps[0]) / (len(steps) - 1) * run.tokens_per_step / rate


def _seconds_left(run: RunRecord) -> float | None:
    """Time of the remaining training steps at the recent throughput; measurements and saves come on top."""
    rates = run.series("perf/tokens_per_s").values[-RECENT:]
    if not rates or run.planned_steps is None or run.tokens_per_step is None or median(rates) <= 0:
        return None
    return max(0, run.planned_steps - run.last_logged) * run.tokens_per_step / median(rates)


def duration(seconds: float) -> str:
    """Returns a time span in its two largest units.

    Example:
        >>> duration(42), duration(150), duration(7300), duration(200_000)
        ('42 s', '2 min 30 s', '2 h 1 min', '2 d 7 h')
    """
    for (unit, length), (smaller, part) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} {seconds % length // part:.0f} {smaller}"
    return f"{seconds:.0f} s"


def live_page(found: Snapshot, refresh_s: int, report: str = "") -> str:
    """Returns the page.

    Args:
        found: from `snapshot`.
        refresh_s: seconds after which the browser loads it again while a run trains.
        report: address of the full report, or "" for none.
    """
    refresh = "" if found.over else f'<meta http-equiv="refresh" content="{refresh_s}">'
    runs = [live.run for live in found.runs]
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    lead = f"{len(runs)} run{'s' * (len(runs) != 1)} · {moment} · " + (
        "all runs have ended" if found.over else f"loads again every {refresh_s} s"
    )
    more = f' · <a href="{html.escape(report)}">full report</a>' if report and runs else ""
    problem = f"<p class='problem'>{html.escape(found.problem)}</p>" if found.problem else ""
    waiting = "".join(
        f"<p class='problem'>waiting for {html.escape(plain(str(folder)))}: no metrics yet</p>"
        for folder in found.waiting
    )
    charts = "\n".join(_charts(model, group) for model, group in by_model(runs).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{refresh}
<title>megatron-lion: {html.escape(_title(found))}</title>
<style>{STYLE.replace("AXIS_RULES", "")}{LIVE_STYLE} a {{ color: inherit; }}</style></head>
<body><main>
<h1>Runs</h1>
<p class="lead">{html.escape(lead)}{more}</p>
{problem}{waiting}
<div class="runs">{"".join(map(_card, found.runs))}</div>
{charts}
</main></body></html>
"""


def _title(found: Snapshot) -> str:
    """What a browser's tab shows: progress in percent, so that it can be followed without opening the page."""
    shares = [live.run.last_logged / live.run.planned_steps for live in found.runs if live.run.planned_steps]
    return (
        f"{100 * fmean(shares):.0f} % of {len(found.runs)} run{'s' * (len(found.runs) != 1)}" if shares else "waiting"
    )


def _card(live: Live) -> str:
    run = live.run
    colour = lines_of([run])[0].colour
    total = run.planned_steps
    facts = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in live.facts)
    done = f"step {run.last_logged:,}" + (f" of {total:,}" if total else "")
    share = 100 * min(run.last_logged / total, 1.0) if total else 0.0
    bar = f'<div class="bar"><div style="width:{share:.1f}%"></div></div>' if total else ""
    return (
        f'<div class="run" style="--c:{colour}"><h3>{html.escape(f"{run.model} {run.label}")}</h3>'
        f"<p>{html.escape(live.state)} · {done} · {html.escape(plain(str(run.folder)))}</p>{bar}<dl>{facts}</dl></div>\n"
    )


def _charts(model: str, group: list[RunRecord]) -> str:
    shown = [panel for panel in panels(group) if panel.slug != "learning-rate"]
    shown += _progress_panels(group)
    figures = "".join(f"<figure>{chart(panel)}</figure>\n" for panel in shown)
    if not figures:
        return f"<p class='note'>{html.escape(model)}: nothing measured yet</p>"
    note = f"<p class='note'>losses in {html.escape(loss_unit(group))}</p>"
    return f'<section><h2>{html.escape(model)}</h2><div class="charts">{figures}</div>{note}</section>'


def _progress_panels(runs: list[RunRecord]) -> list[Panel]:
    """Panels of what the report does not draw: validation loss, rate, throughput, memory and skipped steps."""
    every: list[tuple[str, str, str, str, Callable[[float], bool]]] = [
        ("valid/loss", "Validation loss", loss_unit(runs), "valid-loss", lambda value: True),
        ("optim/lr", "Learning rate", "learning rate", "rate", lambda value: True),
        ("perf/tokens_per_s", "Throughput", "tokens/s", "throughput", lambda value: True),
        ("memory/max_gib", "Largest memory", "GiB of the first process", "memory", lambda value: True),
        ("optim/skipped_steps", "Skipped steps", "steps so far", "skipped", lambda value: value > 0),
    ]
    made = []
    for key, title, unit, slug, shown in every:
        curves = [
            Curve(label=line.label, x=series.steps, y=series.values, colour=line.colour, dash=line.dash)
            for line in lines_of(runs) for run in line.runs if (series := run.series(key))
        ]  # fmt: skip
        if any(shown(value) for curve in curves for value in curve.y):
            # The rates of SGD and LION differ a thousandfold; the last rate of a schedule may be 0.
            log = slug == "rate" and max(max(c.y) for c in curves) > LOG_RANGE * max(
                min(max(c.y) for c in curves), 1e-30
            )
            curves = [_positive(curve) for curve in curves if max(curve.y) > 0] if log else curves
            zero = slug != "valid-loss" and not log
            made.append(Panel(slug=slug, title=title, y_label=unit, curves=curves, from_zero=zero, log_y=log))
    return made


def _positive(curve: Curve) -> Curve:
    """The points of a curve that a logarithmic axis can show."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y > 0]
    return replace(curve, x=[x for x, _ in points], y=[y for _, y in points])
