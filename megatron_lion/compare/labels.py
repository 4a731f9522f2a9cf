"""The settings in which runs differ, and labels made from them."""

from __future__ import annotations

import json
import os.path
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lion.plain_text import plain
from megatron_lion.runs.record import OPTIMIZER_NAMES, RunRecord

# Settings that decide where a run is stored or how it is observed, not what it computes.
UNINTERESTING = ("run_dir", "name", "log.", "data.cache", "data.num_workers", "checkpoint.", "train.log_every",
                 "train.test_every", "probe.")  # fmt: skip
MOST_NAMED = 3
"""Largest number of settings in a label; runs that differ in more are named after their folders."""


def with_labels(runs: list[RunRecord]) -> list[RunRecord]:
    """Gives each run a label, and a name for the setting that it shares with other seeds; both are unique within a model.

    A label is the optimizer and the settings in which the runs differ, or the folder if they differ in more than
    `MOST_NAMED`. Equal labels get the end of their folder, and if that is equal too, a number.
    """
    labels = [""] * len(runs)
    for places in _alike([(run.model, run.optimizer) for run in runs]):
        for place, label in zip(places, _labels([runs[place] for place in places]), strict=True):
            labels[place] = label
    for places in _alike([run.model for run in runs]):
        apart = _apart([labels[place] for place in places], [[runs[place].folder] for place in places])
        for place, label in zip(places, apart, strict=True):
            labels[place] = label
    runs = [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    names: dict[tuple[str, ...], str] = {}
    for family in by_model(runs).values():
        groups = seed_groups(family)
        found = [_setting_name(group, family) for group in groups.values()]
        names |= zip(groups, _apart(found, [[run.folder for run in group] for group in groups.values()]), strict=True)
    return [replace(run, setting=names[group_key(run)]) for run in runs]


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of each key in the list."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """The optimizer of runs that share it, with what distinguishes each run from the others."""
    if len(runs) == 1:
        return [_optimizer(runs[0])]
    differing = differing_settings(runs)
    ends = _ends([[run.folder] for run in runs])
    return [f"{_optimizer(run)} {_distinction(run, differing) or end}" for run, end in zip(runs, ends, strict=True)]


def _setting_name(group: Sequence[RunRecord], runs: Sequence[RunRecord]) -> str:
    """The label of a setting's runs without the seed, or what distinguishes it from other settings of the optimizer."""
    labels = {_without_seed(run.label) for run in group}
    if len(labels) == 1:
        return labels.pop()
    rivals = [run for run in runs if run.optimizer == group[0].optimizer]
    distinction = _distinction(group[0], [key for key in differing_settings(rivals) if key != "seed"])
    if distinction is not None:
        return f"{_optimizer(group[0])} {distinction}"
    groups = list(seed_groups(rivals).values())
    ends = _ends([[run.folder for run in other] for other in groups])
    return f"{_optimizer(group[0])} {ends[groups.index(list(group))]}"


def _optimizer(run: RunRecord) -> str:
    return OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)


def _without_seed(label: str) -> str:
    return " ".join(word for word in label.split(" ") if not word.startswith("seed="))


def _distinction(run: RunRecord, differing: Sequence[str]) -> str | None:
    """The values of the settings that differ, such as `lr=0.001 seed=2`; None if there are none or too many."""
    different = [key for key in differing if key in run.settings]
    if not different or len(different) > MOST_NAMED:
        return None
    return " ".join(f"{key.rpartition('.')[2]}={show(run.settings[key])}" for key in different)


def _apart(labels: Sequence[str], folders: Sequence[Sequence[Path]]) -> list[str]:
    """Makes labels unique: equal ones get the end of their folders, then a number."""
    found = list(labels)
    for label, count in Counter(labels).items():
        if count > 1:
            places = [place for place, other in enumerate(labels) if other == label]
            for place, end in zip(places, _ends([folders[place] for place in places]), strict=True):
                found[place] = f"{label} ({end})"
    return numbered(found)


def _ends(folders: Sequence[Sequence[Path]]) -> list[str]:
    """For each group of folders the shortest end of its path that differs from those of the others.

    The path of a group is the folder that holds all of it, so that a setting is not named after one of its seeds. If
    groups share this folder, their first folders are used.
    """
    paths = [Path(os.path.commonpath([os.path.abspath(one) for one in group])).parts for group in folders]
    more = [""] * len(folders)
    if len(set(paths)) < len(paths):
        paths = [Path(os.path.abspath(group[0])).parts for group in folders]
        more = [f" and {len(group) - 1} more" if len(group) > 1 else "" for group in folders]
    count = 1
    while count < max(map(len, paths)) and len({path[-count:] for path in paths}) < len(set(paths)):
        count += 1
    return [plain(str(Path(*path[-count:]))) + others for path, others in zip(paths, more, strict=True)]


def numbered(labels: Sequence[str]) -> list[str]:
    """Adds a number to labels that occurred before.

    >>> numbered(["LION", "SGD", "LION", "LION #2"])
    ['LION', 'SGD', 'LION #2', 'LION #2 #2']
    """
    found: dict[str, None] = {}
    for label in labels:
        name, number = label, 2
        while name in found:
            name, number = f"{label} #{number}", number + 1
        found[name] = None
    return list(found)


def _computing(run: RunRecord) -> dict[str, Any]:
    """The settings that decide what a run computes; `train.stop_after` only if it ends the run before its schedule.

    `data.path` is replaced by the digest of the data, if the run states it: a dataset may have several copies, such as the
    RUN.text of each run on one text.
    """
    found = {key: value for key, value in run.settings.items() if not key.startswith(UNINTERESTING)}
    if "data.path" in found and (digest := run.facts.get("data_digest")):
        found["data.path"] = digest
    if run.planned_steps == run.scheduled_steps:
        found.pop("train.stop_after", None)
    return found


def differing_settings(runs: Iterable[RunRecord]) -> list[str]:
    """Dotted keys whose values are not the same in all runs, without those of `UNINTERESTING`."""
    settings = [_computing(run) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    return [
        key for key in keys if len({json.dumps(found.get(key), sort_keys=True, default=str) for found in settings}) > 1
    ]


def group_key(run: RunRecord) -> tuple[str, ...]:
    """A key that is equal for runs that differ only in their seed, and are planned to end at the same step."""
    relevant = {key: value for key, value in _computing(run).items() if key != "seed"}
    return (run.model, run.optimizer, json.dumps(relevant, sort_keys=True, default=str))


def seed_groups(runs: Iterable[RunRecord]) -> dict[tuple[str, ...], list[RunRecord]]:
    """Groups of runs that differ only in their seed, in the order given."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    return groups


def setting_names(groups: Mapping[tuple[str, ...], Sequence[RunRecord]]) -> dict[tuple[str, ...], str]:
    """The name of each setting, unique within a model: `RunRecord.setting`, or the label without the seed.

    Args:
        groups: from `seed_groups`.
    """
    names: dict[tuple[str, ...], str] = {}
    for model in dict.fromkeys(group[0].model for group in groups.values()):
        keys = [key for key, group in groups.items() if group[0].model == model]
        found = [groups[key][0].setting or _without_seed(groups[key][0].label) for key in keys]
        names |= zip(keys, numbered(found), strict=True)
    return names


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
