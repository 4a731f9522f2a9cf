"""What a run's training data holds of a text that it is evaluated on, as `prepare --decontaminate` found it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lion.data.manifest import Overlap
from megatron_lion.evaluate.tasks import Task
from megatron_lion.files import sha256_file
from megatron_lion.runs.paths import facts_file
from megatron_lion.runs.sealed_json import read_sealed

KEY = "train_overlaps"
"""Key of the overlaps in run.json, for each dataset of the run, and in a result, for the result's text."""


def with_train_overlaps(tasks: Sequence[Task], run_dir: Path) -> list[Task]:
    """Returns the tasks with what each dataset of the run holds of the task's text, or None if that is not known.

    It is known if every dataset was prepared with `--decontaminate` and this text: the same file, or a file with the same
    decompressed content.

    Args:
        tasks: measurements.
        run_dir: folder of the run that is measured.
    """
    datasets = _of_run(run_dir)
    found = []
    for task in tasks:
        sha256s = (
            {task.conditions["text_sha256"], sha256_file(Path(task.conditions["text_path"]))} if datasets else set()
        )
        # A dataset of `merge` has an entry for each of the datasets that it was joined from.
        of_text = [[dataclasses.asdict(one) for one in dataset if one.sha256 in sha256s] for dataset in datasets]
        known = list(itertools.chain.from_iterable(of_text))
        complete = datasets and all(of_text)
        found.append(dataclasses.replace(task, conditions={**task.conditions, KEY: known if complete else None}))
    return found


def overlap_text(result: dict[str, Any]) -> str:
    """Returns the part of a table's cell about a result's overlap, such as "overlap 0.12%", or "" if it is not known.

    Of several datasets, the largest share is a lower bound, since they may hold different passages.
    """
    overlaps = result.get(KEY) or []
    if not overlaps:
        return ""
    share = max(one["train_ngrams"] / one["ngrams"] for one in overlaps)
    return f"overlap {'≥ ' if len(overlaps) > 1 and share else ''}{share:.2%}"


def _of_run(run_dir: Path) -> list[list[Overlap]]:
    """Returns the overlaps of each dataset in run.json; empty if there are none, or the file is not what a run wrote."""
    try:
        stored = read_sealed(facts_file(run_dir)).get(KEY) or []
        return [[Overlap(**one) for one in dataset] for dataset in stored]
    except (OSError, ValueError, TypeError):
        return []
