"""The settings in which runs differ, and labels made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megatron_lion.plain_text import plain
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord

# Settings that decide where a run is stored or how it is observed, not what it computes.
UNINTERESTING = ("run_dir", "name", "log.", "data.cache", "data.num_workers", "checkpoint.", "train.log_every",
                 "train.test_every", "train.stop_after", "probe.")  # fmt: skip


def with_labels(runs: list[RunRecord]) -> list[RunRecord]:
    """Labels runs by optimizer, then by the settings in which they differ, then by folder, until labels are unique."""
    labelled = []
    for run in runs:
        rivals = [r for r in runs if (r.model, r.optimizer) == (run.model, run.optimizer)]
        base = OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)
        label = base if len(rivals) == 1 else f"{base} {_distinction(run, rivals)}"
        labelled.append(replace(run, label=label))
    labels = [(run.model, run.label) for run in labelled]
    return [
        replace(run, label=f"{run.label} ({plain(run.folder.name)})")
        if labels.count((run.model, run.label)) > 1
        else run
        for run in labelled
    ]


def _distinction(run: RunRecord, rivals: list[RunRecord]) -> str:
    """The settings in which a run differs from its rivals, such as `lr=0.001 seed=2`; its folder if more than three."""
    different = [key for key in differing_settings(rivals) if key in run.settings]
    if not different or len(different) > 3:
        return plain(run.folder.name)
    return " ".join(f"{key.rpartition('.')[2]}={show(run.settings[key])}" for key in different)


def differing_settings(runs: Iterable[RunRecord]) -> list[str]:
    """Dotted keys whose values are not the same in all runs, without those of `UNINTERESTING`."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [
        key
        for key in keys
        if not key.startswith(UNINTERESTING)
        and len({json.dumps(run.settings.get(key), sort_keys=True, default=str) for run in runs}) > 1
    ]


def group_key(run: RunRecord) -> tuple[str, ...]:
    """A key that is equal for runs that differ only in their seed."""
    relevant = {k: v for k, v in run.settings.items() if k != "seed" and not k.startswith(UNINTERESTING)}
    return (run.model, run.optimizer, json.dumps(relevant, sort_keys=True, default=str))


def by_model(runs: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each model, in the order given."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    return groups


def loss_unit(runs: Iterable[RunRecord]) -> str:
    """The unit of the runs' losses; "nats" if GPT-2 and BERT are mixed.

    GPT-2's loss is a mean over tokens. BERT's is a mean over masked tokens plus a mean over samples.
    """
    are_bert = {bool(run.series("train/mlm_loss") or run.series("test/mlm_loss")) for run in runs}
    if are_bert == {True}:
        return "nats, masked tokens + order"
    return "nats" if True in are_bert else "nats per token"


def show(value: Any) -> str:
    """The text of a setting's value; an en dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(show, value)) + ")"
    return str(value)
