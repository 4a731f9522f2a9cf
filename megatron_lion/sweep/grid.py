"""Parses the grids of a sweep: `optimizer.lr=3e-3,1e-3` or, for one optimizer only, `sgd:optimizer.lr=0.3,0.1`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args, get_type_hints

from megatron_lion.config import OptimizerConfig, RunConfig
from megatron_lion.configfile import UserParser, add_run_config, flags_as_given, known_keys, suggestion
from megatron_lion.errors import ConfigError
from megatron_lion.optimizer_switch import switched
from megatron_lion.runs.folder import changeable

PAPER_RATES = ("3e-3", "1e-3", "3e-4", "1e-4", "3e-5", "1e-5", "3e-6", "1e-6")
"""The learning rates of the paper's search on CIFAR. Source: Dong, Li, Lin, arXiv 2411.07724."""
NAMED_VALUES = {("optimizer.lr", "paper"): PAPER_RATES}
OPTIMIZERS: tuple[str, ...] = get_args(get_type_hints(OptimizerConfig)["name"])

# Optimizers that read a setting: a grid over it would train the other optimizers several times with equal results.
READ_BY = {
    "optimizer.betas": ("lion", "adamw"), "optimizer.momentum": ("sgd",), "optimizer.coupled_weight_decay": ("sgd",),
    "optimizer.eps": ("adamw",), "optimizer.init_exp_avg": ("lion",), "optimizer.master_weights": ("lion",),
    "optimizer.momentum_dtype": ("lion",),
}  # fmt: skip

_NO_COMMON_MEASURE = "the validation losses of such runs are not comparable; make one sweep for each value"
# Keys that a grid must not vary, and the reason.
REFUSED = {
    "run_dir": "a sweep names the folders of its runs itself, inside --output",
    "name": "all runs of a sweep are one model; give --name once",
    "train.stop_after": "runs of different lengths are not comparable; give --train.stop_after once",
    "train.test_batches": _NO_COMMON_MEASURE,
    "model.kind": _NO_COMMON_MEASURE,
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and the values it takes.

    Attributes:
        key: dotted key of a config.
        values: different values, with the types of the config.
        optimizer: the only optimizer that takes these values; None for all optimizers without their own axis for the key.
    """

    key: str
    values: tuple[Any, ...]
    optimizer: str | None = None


def parse_grids(texts: Sequence[str]) -> list[Axis]:
    """Parses all --grid flags.

    Args:
        texts: texts such as "optimizer.lr=1e-3,3e-4", "optimizer.lr=paper", "sgd:optimizer.weight_decay=0". A comma
            inside brackets belongs to the value: "optimizer.betas=[0.9,0.95],[0.9,0.99]".

    Returns:
        One axis for each text.

    Raises:
        ConfigError: no grid, an unknown key, a key that a grid must not vary, no values, a repeated or an invalid value.
    """
    if not texts:
        raise ConfigError("--grid: a sweep needs at least one, such as --grid optimizer.lr=1e-3,3e-4,1e-4")
    parser = UserParser(exit_on_error=False)
    add_run_config(parser)
    axes: list[Axis] = []
    for text in texts:
        axis = _parse_axis(parser, text)
        if any((axis.key, axis.optimizer) == (other.key, other.optimizer) for other in axes):
            raise ConfigError(f"--grid {text}: {axis.key} has a grid already; put all its values into one grid")
        axes.append(axis)
    return axes


def _parse_axis(parser: UserParser, text: str) -> Axis:
    name, equals, listed = text.partition("=")
    scope, colon, key = name.strip().rpartition(":")
    if not equals or not key:
        raise ConfigError(f"--grid {text}: expected KEY=VALUE,VALUE,… such as optimizer.lr=1e-3,3e-4")
    if colon and scope not in OPTIMIZERS:
        raise ConfigError(
            f"--grid {text}: '{scope}' is not an optimizer; expected one of {', '.join(OPTIMIZERS)} before the ':'"
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
            raise ConfigError(f"--grid {text}: {word} is given twice; each value makes one run, so give it once")
        values.append(value)
    return Axis(key=key, values=tuple(values), optimizer=scope or None)


def _check_key(text: str, key: str, scope: str | None) -> None:
    """Raises ConfigError for an unknown key and for a key in which the runs of a sweep must not differ."""
    if key not in known_keys():
        raise ConfigError(f"--grid {text}: there is no setting '{key}'{suggestion(key)}")
    members = [known for known in known_keys() if known.startswith(key + ".")]
    if members:
        raise ConfigError(f"--grid {text}: {key} is a group of settings; name one of them, such as {members[0]}")
    if key in REFUSED or key.startswith("data."):
        raise ConfigError(f"--grid {text}: a grid must not vary {key}: {REFUSED.get(key, _NO_COMMON_MEASURE)}")
    if changeable(key):
        raise ConfigError(f"--grid {text}: {key} does not change what is trained; give it once, as --{key} VALUE")
    if key == "optimizer.name" and scope:
        raise ConfigError(f"--grid {text}: '{scope}:' already sets optimizer.name; leave '{scope}:' out")


def split_values(text: str) -> list[str]:
    """Splits at commas outside brackets.

    Example:
        >>> split_values("[0.9, 0.95],[0.9,0.99]"), split_values("1e-3, 3e-4"), split_values("")
        (['[0.9, 0.95]', '[0.9,0.99]'], ['1e-3', '3e-4'], [''])
    """
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text)]


def _parse_value(parser: UserParser, key: str, word: str, text: str) -> Any:
    try:
        config = flags_as_given(parser, parser.parse_args([f"--{key}={word}"]))
    except ConfigError as error:
        raise ConfigError(f"--grid {text}: {error}") from error
    return get_setting(config, key)


def get_setting(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def with_settings(base: RunConfig, settings: Mapping[str, Any]) -> tuple[RunConfig, str]:
    """Returns a copy of a sweep's base config with the settings of one run, by dotted key, and a note for the user or "".

    If they change the optimizer and give no rate, rate and decay are converted as in `pretrain`, and the note reports it.
    """
    config = base
    for key, value in settings.items():
        config = with_setting(config, key, value)
    given = [key.removeprefix("optimizer.") for key in settings if key.startswith("optimizer.")]
    optimizer, note = switched(base.optimizer, config.optimizer, given, "the sweep's config")
    return dataclasses.replace(config, optimizer=optimizer), note


def with_setting(config: RunConfig, key: str, value: Any) -> RunConfig:
    """A copy of a config with another value at a dotted key."""
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: inner})


def settings_of_runs(axes: Sequence[Axis], base_optimizer: str) -> list[dict[str, Any]]:
    """The settings of each run by dotted key: the cross product of the grids, for each optimizer in turn.

    Args:
        axes: from `parse_grids`.
        base_optimizer: the optimizer of the runs if no axis varies it.

    Raises:
        ConfigError: an axis is for an optimizer that the sweep lacks, or an optimizer of the sweep does not read it.
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
