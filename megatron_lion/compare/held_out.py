"""Which runs measured their losses on the same held-out samples, so that the lowest loss may be marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from megatron_lion.compare.labels import by_model, show
from megatron_lion.compare.table import one_line
from megatron_lion.config import RunConfig
from megatron_lion.runs.folder import BEFORE, flatten
from megatron_lion.runs.record import RunRecord

MOST_VALUES = 4
"""Largest number of values of a setting that a note lists."""
_NUMBER = "number of samples"
# What decides which samples a run draws. Facts of run.json come first: a digest covers the content, weights and split of
# all corpora, which a path does not.
_FACTS = {"data_digest": "data digest", "tokenizer_sha256": "tokenizer"}
_DRAWN = ("model.kind", "model.seq_length", "data.weights", "data.split")
_MASKED = ("data.mask_probability", "data.mask_max_ngram", "data.short_sequence_probability", "data.masking")
_COUNTS = ("train.test_batches", "train.global_batch_size")


@cache
def _defaults() -> dict[str, Any]:
    return flatten(asdict(RunConfig())) | BEFORE


def _setting(run: RunRecord, key: str) -> Any:
    """A setting; its default, or the value from before, if config.yaml lacks it, and None if there is no config.yaml."""
    return run.settings.get(key, _defaults()[key]) if run.settings else None


def _samples(run: RunRecord, *, held_out: bool) -> dict[str, Any]:
    """What decides a run's samples, by name; None for a value that the run does not record."""
    found = {name: run.facts.get(key) for key, name in _FACTS.items()}
    keys = [*_DRAWN, *(_MASKED if _setting(run, "model.kind") == "bert" else ())]
    found |= {key: _setting(run, key) for key in keys}
    if found["data digest"] is not None:  # which covers them
        found |= {"data.weights": None, "data.split": None}
    if held_out:
        batches, size = (_setting(run, key) for key in _COUNTS)
        whole = isinstance(batches, int) and isinstance(size, int)
        found[_NUMBER] = batches * size if whole else None
    return found


def differences(runs: Iterable[RunRecord], *, held_out: bool = True) -> list[str]:
    """The settings in which the samples of runs differ, with their values; [] if they are the same up to the seed.

    A value that a run does not record counts as equal: earlier versions wrote no digest.

    Args:
        runs: the runs.
        held_out: whether the validation and test samples are meant; otherwise the training samples, of which the number
            is no condition.
    """
    runs = list(runs)
    samples = [_samples(run, held_out=held_out) for run in runs]
    found = []
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [value for sample in samples if (value := sample.get(name)) is not None]
        if len({repr(value) for value in values}) < 2:
            continue
        if name == _NUMBER:
            found += [
                _values(key, [_setting(run, key) for run in runs])
                for key in _COUNTS
                if len({_setting(run, key) for run in runs} - {None}) > 1
            ]
        else:
            found.append(_values(name, [value[:8] if name in _FACTS.values() else value for value in values]))
    return found


def _values(name: str, values: Sequence[Any]) -> str:
    """`name a, b`: the different values in order.

    >>> _values("train.test_batches", [8, 2, 8])
    'train.test_batches 8, 2'
    """
    different = list(dict.fromkeys(show(value) for value in values if value is not None))
    more = f" and {len(different) - MOST_VALUES} more" if len(different) > MOST_VALUES else ""
    return f"{name} {', '.join(different[:MOST_VALUES])}{more}"


def seeds_differ(rows: Iterable[Iterable[RunRecord]]) -> bool:
    """Whether the rows of a table are of different seeds, which draw different held-out samples."""
    seeds = [frozenset(run.seed for run in row if run.seed is not None) for row in rows]
    return len({found for found in seeds if found}) > 1


def reason(rows: Sequence[Sequence[RunRecord]]) -> str | None:
    """The reason why the held-out losses of a table's rows are not of the same samples, or None if they are.

    Args:
        rows: for each row of one model, its runs: the seeds of a setting, or one run.
    """
    if found := differences(run for row in rows for run in row):
        return f"the runs are measured on different held-out samples ({'; '.join(found)})"
    if seeds_differ(rows):
        return "each seed draws its own held-out samples"
    return None


def withheld(runs: Sequence[RunRecord], columns: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The cells of a table of runs in which no lowest value is marked, and the notes that give the reasons.

    Args:
        runs: the runs of the table, one a row, grouped by model in its first column.
        columns: headings of the columns with held-out losses.

    Returns:
        (model, heading) pairs for `Table.unmarked`, and one note for each model that has one.
    """
    pairs: list[tuple[str, str]] = []
    notes = []
    for model, group in by_model(list(runs)).items():
        why = reason([[run] for run in group])
        if why is not None:
            pairs += [(one_line(model), heading) for heading in columns]
            notes.append(f"{model}: no lowest held-out loss is marked, because {why}")
    return pairs, notes
