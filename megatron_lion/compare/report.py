"""One HTML file that tells a comparison: charts, tables, settings, environment. It loads nothing from anywhere."""

from __future__ import annotations

import html
import time
from pathlib import Path

from megatron_lion import __version__
from megatron_lion.compare.curves import panels
from megatron_lion.compare.runs import RunRecord, flatten, show
from megatron_lion.compare.svg import chart
from megatron_lion.compare.table import Table, to_html
from megatron_lion.compare.tables import by_model
from megatron_lion.data.files import write_whole

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
svg .curve { --shown: var(--c); }
svg .curve polyline, svg .curve line { fill: none; stroke: var(--shown); stroke-width: 2; stroke-linejoin: round; }
svg .curve .faint { stroke-width: 0.8; opacity: 0.28; }
svg .curve circle { fill: var(--shown); }
svg .label { font-size: 13px; font-weight: 600; fill: var(--shown); }
@media (prefers-color-scheme: dark) { svg .curve { --shown: color-mix(in srgb, var(--c) 62%, white); } }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; background: var(--card); }
.number { text-align: right; } .text { text-align: left; } td.best { background: var(--good); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { font-size: 0.8rem; overflow-x: auto; margin: 8px 0 0; }
@media (max-width: 600px) { body { padding: 14px 10px 32px; } h1 { font-size: 1.25rem; } .charts figure { padding: 6px; } }
"""


def write_report(runs: list[RunRecord], tables: list[Table], path: Path) -> Path:
    """Writes the report.

    Args:
        runs: from `read_runs`.
        tables: from `build_tables`.
        path: the .html file.
    """
    write_whole(path, render_report(runs, tables).encode("utf-8"))
    return path


def render_report(runs: list[RunRecord], tables: list[Table]) -> str:
    """The whole page as text."""
    models = by_model(runs)
    title = f"Comparison: {', '.join(models)}"
    labels = ", ".join(dict.fromkeys(run.label for run in runs))
    summary = html.escape(f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {labels}")
    charts = "\n".join(_charts(model, group) for model, group in models.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p class="lead">{summary} · made {time.strftime("%Y-%m-%d %H:%M")} by megatron-lion {__version__} ·
losses in nats per token; the shaded cell is the lowest of its model</p>
{charts}
{"".join(to_html(table) for table in tables)}
<section id="runs"><h2>Runs</h2>
{"".join(map(_run_details, runs))}
</section>
</body></html>
"""


def _charts(model: str, group: list[RunRecord]) -> str:
    figures = "".join(f"<figure>{chart(panel)}</figure>\n" for panel in panels(group))
    if not figures:
        return f"<p class='note'>{html.escape(model)}: nothing measured yet</p>"
    return f'<section><h2>{html.escape(model)}</h2><div class="charts">{figures}</div></section>'


def _run_details(run: RunRecord) -> str:
    """A fold with a run's settings and environment."""
    settings = "\n".join(f"{key}: {show(value)}" for key, value in run.settings.items())
    environment = "\n".join(f"{key}: {show(value)}" for key, value in flatten(run.environment).items())
    return (
        f"<details><summary>{html.escape(f'{run.model} {run.label}')} — {html.escape(str(run.folder))}</summary>"
        f"<h3>Settings</h3><pre>{html.escape(settings or 'none recorded')}</pre>"
        f"<h3>Environment</h3><pre>{html.escape(environment or 'none recorded')}</pre></details>\n"
    )
