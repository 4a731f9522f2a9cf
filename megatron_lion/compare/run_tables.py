"""The tables of a comparison: Table B.1, losses, norm ratios, cost, settings, environment."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from megatron_lion.compare.budgets import equal_budget_table, loss_tables, target_table
from megatron_lion.compare.held_out import differences, seeds_differ, withheld
from megatron_lion.compare.labels import by_model, differing_settings, loss_unit, show
from megatron_lion.compare.seeds import seeds_table
from megatron_lion.compare.selection import evaluation_key, evaluation_keys
from megatron_lion.compare.table import Cell, Table
from megatron_lion.runs.folder import flatten
from megatron_lion.runs.record import LAST_LINES, REFERENCE, RunRecord
from megatron_lion.runs.series import Series

MOST_COLUMNS = 6
"""Largest number of runs that are shown as columns; more are shown as rows."""


def build_tables(runs: list[RunRecord], target_loss: float | None = None) -> list[Table]:
    """All tables for which the runs have data.

    Args:
        runs: from `read_runs`.
        target_loss: test loss (nats/token) for the table of steps to a target; by default one that every finished run of a
            model reaches, see `budgets.default_target`.
    """
    trained = [run for run in runs if not run.is_reference]
    tables = [
        *perplexity_tables(runs), *word_tables(runs), seeds_table(trained), loss_table(trained), bert_table(trained),
        *loss_tables(trained), equal_budget_table(trained), target_table(trained, target_loss), ratio_table(trained),
        cost_table(trained), settings_table(trained), environment_table(trained),
    ]  # fmt: skip
    return [table for table in tables if table is not None and table.rows]


def perplexity_tables(runs: list[RunRecord]) -> list[Table]:
    """The paper's Table B.1: natural log of perplexity by optimizer and step, one table per text and convention.

    Source: Dong, Li, Lin, arXiv 2411.07724, Table B.1.
    """
    tables = []
    for number, key in enumerate(evaluation_keys(runs)):
        first = next(r for run in runs for r in run.evaluations if evaluation_key(r) == key)
        tables += [
            _perplexity_table(runs, key, first, number, field) for field in ("log_token_ppl", "log_adjusted_ppl")
        ]
    return tables


def _perplexity_table(
    runs: list[RunRecord], key: tuple[Any, ...], first: dict[str, Any], number: int, field: str
) -> Table:
    values = {
        id(run): {int(r["step"]): r.get(field) for r in run.evaluations if evaluation_key(r) == key} for run in runs
    }
    steps = sorted({step for run in runs if not run.is_reference for step in values[id(run)]})
    # The value of a reference belongs to no training step of these runs, so it gets a separate last column.
    last = [REFERENCE] if any(run.is_reference and values[id(run)] for run in runs) else []
    rows: list[list[Cell]] = []
    for run in runs:
        found = values[id(run)]
        of_steps = [None if run.is_reference else found.get(step) for step in steps]
        if found:
            rows.append([run.model, run.label, *of_steps, *(found.get(0) if run.is_reference else None for _ in last)])
    columns = ["model", "optimizer", *(_short_step(step) for step in steps), *last]
    level = "token" if field == "log_token_ppl" else "word (adjusted)"
    vocabularies: dict[str, set[Any]] = {}
    for run in runs:
        vocabularies.setdefault(run.model, set()).update(
            r.get("tokenizer_sha256") for r in run.evaluations if evaluation_key(r) == key
        )
    notes = [_convention(first)]
    by_token = field == "log_token_ppl"
    mixed = [model for model, found in vocabularies.items() if len(found) > 1 and by_token]
    if by_token and len(set().union(*vocabularies.values())) > 1:
        notes.append(
            "the runs have different vocabularies: their token perplexities are not comparable, see the adjusted ones"
        )
    short = "log-perplexity" if by_token else "log-adjusted-perplexity"
    return Table(
        slug=short if number == 0 else f"{short}-{number + 1}",
        title=f"Zero-shot {_text_name(first)}: natural log of the {level} perplexity by step",
        columns=columns,
        rows=rows,
        formats=dict.fromkeys(columns[2:], ".3f"),
        notes=notes,
        best=columns[2 : len(columns) - len(last)],
        unmarked=[(model, heading) for model in mixed for heading in columns[2:]],
    )


def _short_step(step: int) -> str:
    """10k for 10,000; the step itself if it is no multiple of 100.

    >>> _short_step(10_000), _short_step(1200), _short_step(250), _short_step(1234)
    ('10k', '1.2k', '250', '1234')
    """
    return f"{step / 1000:g}k" if step >= 1000 and step % 100 == 0 else str(step)


def _text_name(result: dict[str, Any]) -> str:
    if result.get("kind") == "wikitext103" and result.get("text_version") != "unknown":
        return "WikiText-103"
    return f"{result.get('text_path', 'text')}".rpartition("/")[2]


def _known_text(result: dict[str, Any]) -> str:
    """The published name of a text, or the name of its file."""
    version = result.get("text_version", "unknown")
    return str(version) if version != "unknown" else str(result.get("text_path", "–")).rpartition("/")[2]


def _convention(result: dict[str, Any]) -> str:
    """The convention of a perplexity in one sentence: text, windows, overlap, precision, token and word counts."""
    version = result.get("text_version")
    known = f"{version}, " if version not in (None, "unknown") else ""
    stride, length = result.get("stride"), result.get("seq_length")
    overlap = "no overlap" if stride == length else f"stride {stride}"
    partial = f", first {result['max_tokens']} tokens only" if result.get("max_tokens") else ""
    return (
        f"{known}text {str(result.get('text_sha256'))[:8]}, windows of {length} tokens, {overlap}, "
        f"{result.get('precision')}, n_orig {result.get('n_orig', 0):,}, n_tok {result.get('n_tok', 0):,}{partial}"
    )


def word_tables(runs: list[RunRecord]) -> list[Table]:
    """Page-wise word and byte perplexity, and LAMBADA, from each run's latest result."""
    wanted: dict[str, tuple[str, list[str]]] = {
        "wikitext103_pages": (
            "WikiText page by page (as lm-evaluation-harness)",
            ["word_ppl", "byte_ppl", "bits_per_byte"],
        ),
        "lambada": (
            "LAMBADA: the last word, and its last token alone",
            ["accuracy", "word_ppl", "log_word_ppl", "last_token_accuracy", "last_token_ppl"],
        ),
    }
    tables = []
    for kind, (title, fields) in wanted.items():
        rows: list[list[Cell]] = []
        for run in runs:
            latest: dict[tuple[Any, ...], dict[str, Any]] = {
                evaluation_key(r): r for r in run.evaluations if r["kind"] == kind
            }
            rows += [
                [run.model, run.label, _known_text(r), r["step"], *(r.get(name) for name in fields)]
                for r in latest.values()
            ]
        formats = {
            "accuracy": ".2%",
            "last_token_accuracy": ".2%",
            "last_token_ppl": ",.2f",
            "bits_per_byte": ".4f",
            "byte_ppl": ".4f",
            "word_ppl": ",.2f",
            "log_word_ppl": ".3f",
        }
        columns = ["model", "optimizer", "text", "step", *fields]
        slug = kind.replace("_", "-")
        tables.append(Table(slug=slug, title=title, columns=columns, rows=rows, formats=formats, num_keys=4))
    return tables


def loss_table(runs: list[RunRecord]) -> Table:
    """Final and best losses."""
    columns = ["model", "optimizer", "steps", "train loss", "valid loss", "test loss", "best test loss", "at step"]
    rows: list[list[Cell]] = []
    unmarked, notes = withheld(runs, columns[4:7])
    for model, group in by_model(runs).items():
        if differences(group, held_out=False) or seeds_differ([run] for run in group):
            unmarked.append((model, columns[3]))
    for run in runs:
        test = run.series("test/loss")
        best = test.best()
        if test.steps and run.last_step is not None and test.steps[-1] < run.last_step:
            notes.append(
                f"{run.label} ended at step {run.last_step:,}; its valid and test losses are from step {test.steps[-1]:,}"
            )
        rows.append([run.model, run.label, run.last_step, run.end_train_loss, run.series("valid/loss").last, test.last,
                     best[1] if best else None, best[0] if best else None])  # fmt: skip
    return Table(
        slug="losses",
        title=f"Losses at the end ({loss_unit(runs)})",
        columns=columns,
        rows=rows,
        formats=dict.fromkeys(columns[3:7], ".4f"),
        notes=[
            f"train loss: mean of the last {LAST_LINES} logged values, dropout included; valid and test loss: without dropout",
            *notes,
        ],
        best=columns[3:7],
        unmarked=unmarked,
    )


def bert_table(runs: list[RunRecord]) -> Table:
    """The two parts of BERT's test loss, and the share of right answers of each."""
    keys = ("mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy")
    rows: list[list[Cell]] = [
        [run.model, run.label, *(run.series(f"test/{key}").last for key in keys)]
        for run in runs
        if run.series("test/mlm_loss")
    ]
    columns = ["model", "optimizer", "masked-token loss", "sentence-order loss", "masked tokens", "sentence order"]
    unmarked, notes = withheld([run for run in runs if run.series("test/mlm_loss")], columns[2:4])
    formats = dict.fromkeys(columns[2:4], ".4f") | dict.fromkeys(columns[4:], ".1%")
    title = "BERT on the test split: losses (nats) and share of right answers, last measurement"
    return Table(
        slug="bert", title=title, columns=columns, rows=rows, formats=formats, notes=notes, best=columns[2:4], unmarked=unmarked
    )  # fmt: skip


def ratio_table(runs: list[RunRecord]) -> Table:
    """r = ‖∇f‖₁/‖∇f‖₂ against √d with its noise and error, and the KKT residual, at a run's first and last probe.

    The smallest and largest r of a run are not shown: as extremes of noisy numbers they grow apart with the number of
    probes.
    """
    columns = ["model", "optimizer", "√d", "probes", "batches", "noise first", "noise last", "noise largest", "r first",
               "± first", "r last", "± last", "r/√d first", "r/√d last", "r/√d ≥", "r/√d ≤", "r/√d noise",
               "KKT first", "KKT last"]  # fmt: skip
    rows: list[list[Cell]] = []
    for run in runs:
        ratio, kkt = run.series("probe/norm_ratio"), run.series("probe/kkt_residual")
        if not ratio or run.num_parameters is None:
            continue
        root, ends = math.sqrt(run.num_parameters), (ratio.steps[0], ratio.steps[-1])
        batches = sorted({int(count) for count in run.series("probe/num_batches").values})
        noise = run.series("probe/noise_share")
        errors = [_at(run.series("probe/norm_ratio_standard_error"), step) for step in ends]
        bracket = [_at(run.series(f"probe/norm_ratio_{end}"), ends[1]) for end in ("low", "high", "noise")]
        rows.append([
            run.model, run.label, root, len(ratio.steps), " or ".join(map(str, batches)) or None,
            *(_at(noise, step) for step in ends), max(noise.values, default=None),
            ratio.values[0], errors[0], ratio.values[-1], errors[1], ratio.values[0] / root, ratio.values[-1] / root,
            *(end / root if end is not None else None for end in bracket), kkt.values[0] if kkt else None, kkt.last,
        ])  # fmt: skip
    return Table(
        slug="norm-ratio",
        title="Norm ratio r = ‖∇f‖₁/‖∇f‖₂ and KKT residual",
        columns=columns,
        rows=rows,
        formats=dict.fromkeys(("√d", "r first", "r last", "± first", "± last"), ",.1f")
        | dict.fromkeys((name for name in columns if name.startswith("r/√d")), ".3f")
        | dict.fromkeys((name for name in columns if name.startswith("noise")), ".1%"),
        notes=[
            "batches: number of batches over which each probe averages its gradient; noise: share of the noise that remains in "
            "‖ḡ‖₂²; ±: standard error of r",
            "noise moves r towards the r of the noise itself (r/√d noise), which is 0.798 √d if it is Gaussian and equally "
            "large in all coordinates; r/√d ≥ and ≤: bounds of the noise-free r/√d at the last probe",
        ],
    )


def _at(series: Series, step: int) -> float | None:
    """The value measured at a step, or None."""
    return dict(zip(series.steps, series.values, strict=True)).get(step)


def cost_table(runs: list[RunRecord]) -> Table:
    """Throughput, memory and training time."""
    rows: list[list[Cell]] = []
    for run in runs:
        seconds = run.training_seconds(run.last_step)
        rows.append([
            run.model, run.label, run.num_parameters, run.facts.get("world_size"),
            str(run.facts.get("device") or run.environment.get("device", "–")), run.tokens_per_s, _median(run.series("perf/mfu")),
            run.max_memory_gib, seconds / 3600 if seconds else None,
        ])  # fmt: skip
    return Table(
        slug="cost",
        title="Cost",
        columns=["model", "optimizer", "d", "processes", "device", "tokens/s", "MFU", "memory (GiB)", "training hours"],
        rows=rows,
        formats={"tokens/s": ",.0f", "MFU": ".1%", "memory (GiB)": ".2f", "training hours": ",.2f"},
        notes=["tokens/s and MFU: median of the logged values, over all processes; memory: peak of the first process"],
    )


def _median(series: Series) -> float | None:
    return median(series.values) if series else None


def settings_table(runs: list[RunRecord]) -> Table:
    """The settings in which the runs differ: one column per run, or one row per run if there are many."""
    keys = differing_settings(runs)
    num_keys = 2 if len(runs) > MOST_COLUMNS else 1
    if len(runs) > MOST_COLUMNS:
        columns = ["model", "optimizer", *keys]
        rows: list[list[Cell]] = [
            [run.model, run.label, *(show(run.settings.get(key)) for key in keys)] for run in runs if keys
        ]
    else:
        names = [run.label if len(by_model(runs)) == 1 else f"{run.model} {run.label}" for run in runs]
        columns = ["setting", *names]
        rows = [[key, *(show(run.settings.get(key)) for run in runs)] for key in keys]
    return Table(slug="settings", title="Settings that differ", columns=columns, rows=rows, num_keys=num_keys)


# Entries of environment.json and run.json that may explain a difference between runs.
_ENVIRONMENT = {
    "megatron_lion": "megatron-lion", "git": "git", "python": "Python", "packages.torch": "torch",
    "packages.megatron-core": "megatron-core", "packages.triton": "triton", "packages.transformer-engine": "transformer-engine",
    "device": "device", "world_size": "processes", "system": "system", "data_digest": "data", "tokenizer_sha256": "tokenizer",
}  # fmt: skip


def environment_table(runs: list[RunRecord]) -> Table:
    """Versions, hardware and data: each value with the runs that have it."""
    rows: list[list[Cell]] = []
    for key, name in _ENVIRONMENT.items():
        having: dict[str, list[str]] = {}
        for run in runs:
            value = {**flatten(run.environment), **run.facts}.get(key)
            if value is not None:
                text = str(value)[:12] if key in ("data_digest", "tokenizer_sha256") else str(value)
                having.setdefault(text, []).append(
                    run.label if len(by_model(runs)) == 1 else f"{run.model} {run.label}"
                )
        rows += [
            [name, text, "all" if len(labels) == len(runs) else ", ".join(labels)] for text, labels in having.items()
        ]
    return Table(slug="environment", title="Environment and data", columns=["what", "value", "runs"], rows=rows)
