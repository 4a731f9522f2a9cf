"""The HTML report of a comparison: one self-contained file with charts, tables, settings and environment."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lion import __version__
from megatron_lion.compare.labels import by_model, loss_unit, show
from megatron_lion.compare.panels import AXES, MAX_NAMED, lines_of, panels
from megatron_lion.compare.svg_charts import chart
from megatron_lion.compare.table import Table, to_html
from megatron_lion.files import write_whole
from megatron_lion.plain_text import plain
from megatron_lion.runs.folder import flatten
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #5f6368; --line: #e3e5e8; --paper: #ffffff; --card: #f7f8f9;
  --good: #e4f4ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa3ad; --line: #343a41; --paper: #15181b;
  --card: #1d2125; --good: #163a2a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.05rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 28px 0 8px; }
.lead, .note { color: var(--soft); } .note { font-size: 0.86rem; margin: 6px 0 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.charts figure { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
svg.chart { width: 100%; height: auto; display: block; font-family: inherit; }
svg .title { font-size: 15px; font-weight: 600; fill: var(--ink); }
svg .axis, svg .tick { font-size: 12.5px; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .reference { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 7 3; }
svg .dotted { stroke-dasharray: 1.5 3; }
svg .curve { --shown: var(--c); --said: color-mix(in srgb, var(--c) 80%, black); }
svg .curve polyline, svg .curve line { fill: none; stroke: var(--shown); stroke-width: 2; stroke-linejoin: round; }
svg .curve .faint { stroke-width: 0.8; opacity: 0.28; }
svg .curve .bounds { fill: var(--shown); stroke: none; opacity: 0.14; }
svg .curve .bar { stroke-width: 1.4; } svg .curve circle { fill: var(--shown); }
svg .curve .open { fill: var(--paper); stroke: var(--shown); stroke-width: 1.2; }
svg .nameless polyline { stroke-width: 0.9; opacity: 0.4; }
svg .label { font-size: 13px; font-weight: 600; fill: var(--said); }
@media (prefers-color-scheme: dark) { svg .curve { --shown: color-mix(in srgb, var(--c) 62%, white);
  --said: var(--shown); } }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; background: var(--card); }
.number { text-align: right; } .text { text-align: left; } td.best { background: var(--good); font-weight: 600; }
td:first-child, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--card); } .group th { text-align: left; background: var(--card); }
.group span { position: sticky; left: 11px; color: var(--ink); }
.choice { position: absolute; opacity: 0; pointer-events: none; }
.switch { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; margin: 18px 0 0; color: var(--soft); }
.switch label { padding: 3px 12px; border: 1px solid var(--line); border-radius: 999px; cursor: pointer; color: var(--ink); }
AXIS_RULES
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { font-size: 0.8rem; overflow-x: auto; margin: 8px 0 0; }
@media (max-width: 600px) { body { padding: 14px 10px 32px; } h1 { font-size: 1.25rem; } .charts figure { padding: 6px; }
  table { width: max-content; min-width: 100%; }
  td:first-child { max-width: 52vw; white-space: normal; overflow-wrap: anywhere; } }
"""


# Radio buttons at the start of the page switch the axis without a script, which the page's security policy forbids.
# Charts over the other axes are hidden by CSS; without styles the page shows all of them.
AXIS_RULES = "\n".join(
    f"#by-{axis}:checked ~ main figure:not(.over-{axis}) {{ display: none; }}\n"
    f"#by-{axis}:checked ~ main label[for=by-{axis}] {{ background: var(--ink); color: var(--paper); border-color: var(--ink); }}\n"
    f"#by-{axis}:focus-visible ~ main label[for=by-{axis}] {{ outline: 2px solid var(--soft); outline-offset: 2px; }}"
    for axis in AXES
)
AXIS_NAMES = {"step": "step", "tokens": "tokens", "time": "training time"}


def write_report(
    runs: list[RunRecord], tables: list[Table], path: Path, axis: str = "step", tried: Sequence[RunRecord] = ()
) -> Path:
    """Writes the report.

    Args:
        runs: from `read_runs`.
        tables: from `build_tables`.
        path: the .html file.
        axis: horizontal axis when the page opens, "step", "tokens" or "time"; the reader can switch it.
        tried: the runs that these were chosen from.

    Raises:
        StorageError: the file system refused.
    """
    write_whole(path, render_report(runs, tables, axis, tried).encode("utf-8"))
    return path


def render_report(
    runs: list[RunRecord], tables: list[Table], axis: str = "step", tried: Sequence[RunRecord] = ()
) -> str:
    """The whole page as text."""
    models = by_model(runs)
    title = f"Comparison: {', '.join(models)}"
    chosen = {name: ' checked="checked"' if name == axis else "" for name in AXES}
    radios = "".join(f'<input class="choice" type="radio" name="axis" id="by-{a}"{chosen[a]}>' for a in AXES)
    labels = "".join(f'<label for="by-{a}">{AXIS_NAMES[a]}</label>' for a in AXES)
    charts = "\n".join(_charts(model, group, tried) for model, group in models.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE.replace("AXIS_RULES", AXIS_RULES)}</style></head>
<body>
{radios}
<main>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(_summary(runs))} · made {time.strftime("%Y-%m-%d %H:%M")} by megatron-lion {__version__} ·
losses in {loss_unit(runs)}; the shaded cell is the lowest of its model</p>
<div class="switch">curves by {labels}</div>
{charts}
{"".join(to_html(table) for table in tables)}
<section id="runs"><h2>Runs</h2>
{"".join(map(_run_details, runs))}
</section>
</main>
</body></html>
"""


def _summary(runs: list[RunRecord]) -> str:
    """The labels of the runs if there are at most six, else the number of runs of each optimizer."""
    labels = list(dict.fromkeys(run.label for run in runs))
    if len(labels) > 6:
        optimizers = [OPTIMIZER_NAMES.get(run.optimizer, run.optimizer) for run in runs]
        labels = [f"{optimizers.count(name)} {name}" for name in dict.fromkeys(optimizers)]
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {', '.join(labels)}"


def _charts(model: str, group: list[RunRecord], tried: Sequence[RunRecord]) -> str:
    # As text at once: the curves of long runs take much more memory than their drawing.
    drawn: dict[str, list[str]] = {}
    for axis in AXES:
        for panel in panels(group, axis, tried):
            drawn.setdefault(panel.slug, []).append(f'<figure class="over-{axis}">{chart(panel)}</figure>\n')
    figures = "".join(figure for figures in drawn.values() for figure in figures)
    if not figures:
        return f"<p class='note'>{html.escape(model)}: nothing measured yet</p>"
    lines, notes = lines_of(group), []
    if any(len(line.runs) > 1 for line in lines):
        notes.append("n: seeds of a setting; the line is their mean, the faint lines are the single seeds")
    if len(lines) > MAX_NAMED:
        notes.append(f"{len(lines)} settings; {MAX_NAMED} are named: the best of each optimizer by validation loss")
    caption = "".join(f"<p class='note'>{note}</p>" for note in notes)
    return f'<section><h2>{html.escape(model)}</h2><div class="charts">{figures}</div>{caption}</section>'


def _run_details(run: RunRecord) -> str:
    """A collapsible section with a run's settings and environment."""
    settings = "\n".join(f"{key}: {show(value)}" for key, value in run.settings.items())
    environment = "\n".join(f"{key}: {show(value)}" for key, value in flatten(run.environment).items())
    return (
        f"<details><summary>{html.escape(f'{run.model} {run.label}')} — {html.escape(plain(str(run.folder)))}</summary>"
        f"<h3>Settings</h3><pre>{html.escape(settings or 'none recorded')}</pre>"
        f"<h3>Environment</h3><pre>{html.escape(environment or 'none recorded')}</pre></details>\n"
    )
