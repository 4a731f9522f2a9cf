"""Names and paths of the files in a run folder that more than one module reads or writes.

RUN/config.yaml            settings, resolved
RUN/run.json               facts: name, optimizer, number of parameters, digests
RUN/environment.json       versions and hardware of the last job
RUN/metrics.jsonl          one JSON object a line
RUN/checkpoints/step_…/    see steps.py
RUN/newest_checkpoint      name of the newest checkpoint that was ever saved, which shows whether checkpoints are missing
RUN/probe/step_….json      see probes.py
RUN/probe/smoothness_….json  see smoothness_files.py
RUN/eval/*.json            evaluation results
RUN/tokenizer/, RUN/log/, RUN/lock
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

LOCK = "lock"
LATEST = "latest"
"""File that contains the name of the newest checkpoint, for people and scripts."""


def step_name(step: int) -> str:
    """Returns a step as file names spell it, so that names sort by step up to 9,999,999.

    >>> step_name(1000)
    'step_0001000'
    """
    return f"step_{step:07d}"


def config_file(run_dir: Path) -> Path:
    return run_dir / "config.yaml"


def facts_file(run_dir: Path) -> Path:
    return run_dir / "run.json"


def environment_file(run_dir: Path) -> Path:
    return run_dir / "environment.json"


def metrics_file(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def lock_file(run_dir: Path) -> Path:
    return run_dir / LOCK


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return checkpoints_folder(run_dir) / step_name(step)


def newest_checkpoint_file(run_dir: Path) -> Path:
    return run_dir / "newest_checkpoint"


def probes_folder(run_dir: Path) -> Path:
    return run_dir / "probe"


def smoothness_file(run_dir: Path, step: int, num_steps: int, num_batches: int | Literal["all"], data: str) -> Path:
    """Path of the result of `probe --smoothness` over `num_steps` steps from a checkpoint."""
    return probes_folder(run_dir) / f"smoothness_{step:07d}-{num_steps}-{num_batches}-{data}.json"


def evaluations_folder(run_dir: Path) -> Path:
    return run_dir / "eval"


def tokenizer_folder(run_dir: Path) -> Path:
    return run_dir / "tokenizer"


def log_folder(run_dir: Path) -> Path:
    return run_dir / "log"


def rank_log_file(run_dir: Path, rank: int) -> Path:
    return log_folder(run_dir) / f"rank{rank:05d}.log"


def is_rank_log(name: str) -> bool:
    """Whether a file name is one of `rank_log_file`."""
    return re.fullmatch(r"rank\d{5,}\.log", name) is not None


def has_config(run_dir: Path) -> bool:
    """Whether the folder holds the settings of a run; a Hugging Face folder does not."""
    return config_file(run_dir).is_file()


def has_begun(run_dir: Path) -> bool:
    """Whether the run has written a metric."""
    return metrics_file(run_dir).is_file()
