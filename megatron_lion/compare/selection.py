"""Which runs may be compared, and by which evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lion.compare.labels import with_labels
from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.record import RunRecord, read_run
from megatron_lion.runs.series import SharedSteps


def read_runs(
    folders: Sequence[str | Path], checked: Callable[[RunRecord], RunRecord] = lambda run: run
) -> list[RunRecord]:
    """Reads several run folders and gives each a unique label.

    Args:
        folders: run folders, and folders of references.
        checked: returns a run with the evaluations that may be used; by default with all.

    Raises:
        ConfigError: no folder, or one folder twice.
        CheckpointError: a folder is not a run, or the runs have nothing in common.
    """
    if not folders:
        raise ConfigError("no run folder given; type: megatron-lion compare RUN RUN …")
    places = [Path(folder).resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: the same run is given twice")
    shared: SharedSteps = {}
    runs = [checked(read_run(folder, shared)) for folder in folders]
    _need_common_ground(runs)
    return with_labels(runs)


def _need_common_ground(runs: list[RunRecord]) -> None:
    """Raises CheckpointError if no two runs share a model, a tokenizer or an evaluated text."""
    if len(runs) < 2:
        return
    seen: list[tuple[Any, ...]] = []
    for run in runs:
        marks: set[tuple[Any, ...]] = {("model", run.model), *map(evaluation_key, run.evaluations)}
        if tokenizer := run.facts.get("tokenizer_sha256"):
            marks.add(("tokenizer", tokenizer))
        seen += marks
    if len(seen) == len(set(seen)):
        names = ", ".join(f"{run.folder} ({run.model})" for run in runs)
        raise CheckpointError(
            f"the runs have nothing in common, neither model nor tokenizer nor an evaluated text: {names}"
        )


def evaluation_key(result: dict[str, Any]) -> tuple[Any, ...]:
    """A key that is equal for results on the same text under the same convention."""
    keys = ("kind", "text_sha256", "stride", "seq_length", "precision", "max_tokens")
    return tuple(result.get(key) for key in keys)


def evaluation_keys(runs: Sequence[RunRecord]) -> list[tuple[Any, ...]]:
    """Keys of all token perplexities of the runs; WikiText-103, whole texts and short strides come first."""
    found = {
        evaluation_key(r): (r["kind"] != "wikitext103", r.get("max_tokens") is not None, r.get("stride") or 0)
        for run in runs
        for r in run.evaluations
        if r.get("log_token_ppl") is not None
    }
    return sorted(found, key=lambda key: found[key])


def main_evaluation_key(runs: Sequence[RunRecord]) -> tuple[Any, ...] | None:
    """The convention under which most runs were evaluated; the first of `evaluation_keys` if tied, None without any."""
    keys = evaluation_keys(runs)
    having = {key: sum(any(evaluation_key(r) == key for r in run.evaluations) for run in runs) for key in keys}
    return max(keys, key=lambda key: having[key]) if keys else None
