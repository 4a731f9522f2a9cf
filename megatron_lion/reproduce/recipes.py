"""Sizes, learning rates and possible numbers of processes of the small CPU runs of the demo and the reproductions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import load_config
from megatron_lion.errors import ConfigError
from megatron_lion.jobs import typed_path

VOCAB_SIZE = 2048
SPLIT = "94,3,3"
QUICK_STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its learning rate and weight decay.

    Attributes:
        optimizer: "lion", "sgd" or "adamw".
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
    """

    optimizer: str
    lr: float
    weight_decay: float

    def words(self) -> list[str]:
        """The flags of `pretrain` that set them."""
        return ["--optimizer.name", self.optimizer, "--optimizer.lr", f"{self.lr:g}",
                "--optimizer.weight_decay", f"{self.weight_decay:g}"]  # fmt: skip


# The best rates of the grids in benchmarks/results/rates_demo.md and rates_bert_demo.md.
TUNED = {
    "gpt2": (Recipe("lion", 3e-4, 0.1), Recipe("sgd", 0.3, 0.0), Recipe("adamw", 1e-3, 0.1)),
    "bert": (Recipe("lion", 3e-4, 0.1), Recipe("sgd", 0.1, 0.0), Recipe("adamw", 3e-4, 0.1)),
}
PAPER = (Recipe("lion", 1e-5, 0.01), Recipe("sgd", 1e-4, 0.01))
"""The rates of the paper, which does not state the weight decay; 0.01 is Megatron's default."""


def quick_words() -> list[str]:
    """Flags that shorten a small run to a few seconds, to show that all steps work; its losses mean nothing."""
    half = QUICK_STEPS // 2
    return ["--train.steps", str(QUICK_STEPS), "--checkpoint.at_steps", str([half, QUICK_STEPS]), "--train.test_every", str(half),
            "--probe.every", str(half), "--probe.num_batches", "2", "--train.test_batches", "1"]  # fmt: skip


def list_of_one(path: Path) -> str:
    """A path as the value of --data.path: in brackets, and in quotes only if YAML would read it as something else.

    Example:
        >>> list_of_one(Path("demo/data")), list_of_one(Path("a, b/data"))
        ('[demo/data]', '["a, b/data"]')
    """
    plain = f"[{path}]"
    try:
        read = yaml.safe_load(plain)
    except yaml.YAMLError:
        read = None
    return plain if read == [str(path)] else json.dumps([str(path)], ensure_ascii=False)


def possible_processes(config: RunConfig) -> list[int]:
    """Numbers of processes that can train with a config, ascending; empty if a setting is invalid at any number."""
    layout = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    # Each data-parallel process takes at least one micro-batch of a batch.
    size = config.train.micro_batch_size
    most = config.train.global_batch_size // (1 if size == "auto" else max(1, size)) * layout
    found = []
    for number in range(1, most + 1):
        try:
            check_config(config, number)
        except ConfigError:
            continue
        found.append(number)
    return found


def check_processes(processes: int, files: Sequence[Path]) -> None:
    """Checks that a number of processes can train with each of several configs.

    Args:
        processes: the number given as --processes.
        files: paths of the configs.

    Raises:
        ConfigError: it cannot; the message lists all numbers that can. Or a config is invalid.
    """
    allowed: list[set[int]] = []
    reasons = []
    for file in files:
        config = load_config(file)
        allowed.append(set(possible_processes(config)))
        if not allowed[-1]:
            check_config(config, 1)  # raises, with the setting that is invalid
        train = config.train
        reasons.append(
            f"{typed_path(file)} has batches of {train.global_batch_size} samples in micro-batches of {train.micro_batch_size}"
        )
    if any(processes not in numbers for numbers in allowed):
        *most, last = [str(number) for number in sorted(set.intersection(*allowed))] or ["given for each alone"]
        raise ConfigError(
            f"--processes {processes}: must be {', '.join(most)}{' or ' if most else ''}{last}, because {' and '.join(reasons)}"
        )
