"""The grids of a sweep: `optimizer.lr=3e-3,1e-3` or, for one optimizer alone, `sgd:optimizer.lr=0.3,0.1`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args, get_type_hints

from megatron_lion.config import OptimizerConfig, RunConfig
from megatron_lion.configfile import UserParser, add_run_config, known_keys, run_config_from_namespace, suggestion
from megatron_lion.errors import ConfigError
from megatron_lion.runs.folder import changeable

PAPER_RATES = ("3e-3", "1e-3", "3e-4", "1e-4", "3e-5", "1e-5", "3e-6", "1e-6")
"""The learning rates that the paper searches, for its CIFAR runs. Source: Dong, Li, Lin, arXiv 2411.07724."""
NAMED_VALUES = {("optimizer.lr", "paper"): PAPER_RATES}
OPTIMIZERS: tuple[str, ...] = get_args(get_type_hints(OptimizerConfig)["name"])

# Settings that only some update rules read: a grid over them would train the others several times alike.
READ_BY = {
    "optimizer.betas": ("lion", "adamw"), "optimizer.momentum": ("sgd",), "optimizer.coupled_weight_decay": ("sgd",),
    "optimizer.eps": ("adamw",), "optimizer.init_exp_avg": ("lion",), "optimizer.master_weights": ("lion",),
    "optimizer.momentum_dtype": ("lion",),
}  # fmt: skip

_NO_COMMON_MEASURE = "the validation losses of such runs cannot be held against each other; make a sweep of each"
# Keys that no grid may be over, and why.
REFUSED = {
    "run_dir": "a sweep names the folders of its runs itself, below --output",
    "name": "the runs of a sweep are one model; give --name once",
    "train.stop_after": "runs of other lengths cannot be compared; give --train.stop_after once",
    "train.test_batches": _NO_COMMON_MEASURE,
    "model.kind": _NO_COMMON_MEASURE,
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and the values it takes.

    Attributes:
        key: dotted, as in a config.
        values: typed as in a config, each once.
        optimizer: whose runs alone take these values; None is for all that have no axis of their own for the key.
    """

    key: str
    values: tuple[Any, ...]
    optimizer: str | None = None


def parse_grids(texts: Sequence[str]) -> list[Axis]:
    """Reads the values of all --grid flags.

    Args:
        texts: such as "optimizer.lr=1e-3,3e-4", "optimizer.lr=paper", "sgd:optimizer.weight_decay=0". A comma inside
            brackets belongs to the value: "optimizer.betas=[0.9,0.95],[0.9,0.99]".

    Raises:
        ConfigError: no grid, an unknown key, one that no grid can be over, no values, one twice, or a bad one.
    """
    if not texts:
        raise ConfigError("--grid: a sweep needs at least one, such as --grid optimizer.lr=1e-3,3e-4,1e-4")
    parser = UserParser(exit_on_error=False)
    add_run_config(parser)
    axes: list[Axis] = []
    for text in texts:
        axis = _parse_axis(parser, text)
        if any((axis.key, axis.optimizer) == (other.key, other.optimizer) for other in axes):
            raise ConfigError(f"--grid {text}: {axis.key} has a grid already; put all its values into one")
        axes.append(axis)
    return axes


def _parse_axis(parser: UserParser, text: str) -> Axis:
    name, equals, listed = text.partition("=")
    scope, colon, key = name.strip().rpartition(":")
    if not equals or not key:
        raise ConfigError(f"--grid {text}: expected KEY=VALUE,VALUE,… such as optimizer.lr=1e-3,3e-4")
    if colon and scope not in OPTIMIZERS:
        raise ConfigError(
            f"--grid {text}: '{scope}' is no optimizer; expected one of {', '.join(OPTIMIZERS)} before the ':'"
        )
    _check_key(text, key, scope or None)
    words = [word for part in split_values(listed) for word in NAMED_VALUES.get((key, part), (part,))]
    if not words or "" in words:
        raise ConfigError(
            f"--grid {text}: {'an empty value' if any(words) else 'no values'}; expected {key}=VALUE,VALUE,…"
        )
    values: list[Any] = []
    for word in words:
        value = _parse_value(parser, key, word, text)
        if value in values:
            raise ConfigError(f"--grid {text}: {word} is given twice; each value makes a run of its own")
        values.append(value)
    return Axis(key=key, values=tuple(values), optimizer=scope or None)


def _check_key(text: str, key: str, scope: str | None) -> None:
    """Refuses keys over which runs cannot differ in a sweep."""
    if key not in known_keys():
        raise ConfigError(f"--grid {text}: there is no setting '{key}'{suggestion(key)}")
    members = [known for known in known_keys() if known.startswith(key + ".")]
    if members:
        raise ConfigError(f"--grid {text}: {key} is a group of settings; name one of them, such as {members[0]}")
    if key in REFUSED or key.startswith("data."):
        raise ConfigError(f"--grid {text}: no grid can be over {key}: {REFUSED.get(key, _NO_COMMON_MEASURE)}")
    if changeable(key):
        raise ConfigError(f"--grid {text}: {key} does not change what is trained; give it once, as --{key} VALUE")
    if key == "optimizer.name" and scope:
        raise ConfigError(f"--grid {text}: optimizer.name is what '{scope}:' stands for; leave '{scope}:' out")


def split_values(text: str) -> list[str]:
    """Splits at commas that stand outside brackets.

    Example:
        >>> split_values("[0.9, 0.95],[0.9,0.99]"), split_values("1e-3, 3e-4"), split_values("")
        (['[0.9, 0.95]', '[0.9,0.99]'], ['1e-3', '3e-4'], [''])
    """
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text)]


def _parse_value(parser: UserParser, key: str, word: str, text: str) -> Any:
    try:
        config = run_config_from_namespace(parser, parser.parse_args([f"--{key}={word}"]))
    except ConfigError as error:
        raise ConfigError(f"--grid {text}: {error}") from error
    return get_setting(config, key)


def get_setting(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def with_setting(config: RunConfig, key: str, value: Any) -> RunConfig:
    """A config with another value at a dotted key."""
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: inner})


def settings_of_runs(axes: Sequence[Axis], base_optimizer: str) -> list[dict[str, Any]]:
    """The cross product: what each run sets, optimizer by optimizer, in the order of the grids.

    Args:
        axes: from `parse_grids`.
        base_optimizer: the optimizer of runs if no axis is over it.

    Raises:
        ConfigError: an axis is for an optimizer that the sweep has not, or has no effect on one that it has.
    """
    names = next((axis.values for axis in axes if axis.key == "optimizer.name"), (base_optimizer,))
    for axis in axes:
        if axis.optimizer and axis.optimizer not in names:
            raise ConfigError(
                f"--grid {axis.optimizer}:{axis.key}: no run of this sweep has that optimizer; add it to "
                f"--grid optimizer.name={','.join(names)}"
            )
    settings: list[dict[str, Any]] = []
    for name in names:
        chosen = {axis.key: axis.values for axis in axes if axis.optimizer is None and axis.key != "optimizer.name"}
        chosen |= {axis.key: axis.values for axis in axes if axis.optimizer == name}
        for key, values in chosen.items():
            readers = READ_BY.get(key, OPTIMIZERS)
            if name not in readers and len(values) > 1:
                raise ConfigError(f"--grid {key}: {name} does not read it; write --grid {readers[0]}:{key}=… instead")
        settings += [
            {"optimizer.name": name, **dict(zip(chosen, point, strict=True))} for point in product(*chosen.values())
        ]
    return settings
