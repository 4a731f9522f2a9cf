"""A family of models that differ in their size alone: shapes, learning rates, runs, and the checks of what was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_lion.config import ModelConfig
from megatron_lion.errors import ConfigError
from megatron_lion.reproduce.artefacts import Scale
from megatron_lion.reproduce.recipes import PAPER, TUNED, Recipe
from megatron_lion.runs.record import OPTIMIZER_NAMES

MOST_PROBES = 10
"""Most intervals of the probes in a training, whose interval is the common divisor of the measured steps."""
INVERSE_WIDTH = ("lion", "adamw")
"""Optimizers whose rate is proportional to 1/width: the size of their update does not depend on that of the gradient."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of one model.

    Attributes:
        width: hidden_size.
        depth: number of layers.
    """

    width: int
    depth: int

    @property
    def name(self) -> str:
        return f"w{self.width}-l{self.depth}"


@dataclass(frozen=True, kw_only=True)
class FamilyRun:
    """One run of a family.

    Attributes:
        shape: size of the model.
        recipe: optimizer, with its rate at this width.
        seed: seed of initialization and data order.
    """

    shape: Shape
    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.recipe.optimizer}-{self.shape.name}-seed{self.seed}"

    @property
    def title(self) -> str:
        recipe = self.recipe
        return f"{self.name}: {OPTIMIZER_NAMES[recipe.optimizer]} at {recipe.lr:g}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The runs and measurements that were asked for.

    Attributes:
        scale: "tiny" or "full".
        widths, depths: hidden sizes and numbers of layers; every pair is a model.
        head_size: width of an attention head, the same in all models.
        base_width: width at which the rates of `recipes` are meant.
        recipes: optimizers with their rates at the base width.
        seeds: seeds of the runs of each model and optimizer.
        steps: steps of each run.
        measure_at: steps at which the full gradient is measured, ascending; step 0 is before the first step.
        noise_share: largest share of noise in the squared norm of the averaged gradient that is aimed at.
        first_batches: batches of the first probe of each step.
        max_batches: most batches of a probe, or "all".
    """

    scale: Scale
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    head_size: int
    base_width: int
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    steps: int
    measure_at: tuple[int, ...]
    noise_share: float
    first_batches: int
    max_batches: int | Literal["all"]

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(width=width, depth=depth) for depth in self.depths for width in self.widths]

    def runs(self) -> list[FamilyRun]:
        """All runs; the whole family of one seed and optimizer comes before the next, small models first."""
        return [
            FamilyRun(shape=shape, recipe=scaled_recipe(recipe, shape.width, self.base_width), seed=seed)
            for seed in self.seeds
            for recipe in self.recipes
            for shape in self.shapes
        ]

    @property
    def probe_every(self) -> int:
        """Interval of the probes in a training: the greatest common divisor of the measured steps."""
        return math.gcd(*self.measure_at) or self.steps

    def model(self, shape: Shape, base: ModelConfig) -> ModelConfig:
        """The settings of a model of the family, from those of the config."""
        return replace(
            base, hidden_size=shape.width, num_layers=shape.depth, num_attention_heads=shape.width // self.head_size
        )

    def pretrain_words(self, run: FamilyRun) -> list[str]:
        """The flags of `pretrain` in which the run differs from the config."""
        saved = [step for step in self.measure_at if step > 0]
        words = ["--name", f"gpt2-{run.shape.name}", "--seed", str(run.seed),
                 "--model.num_layers", str(run.shape.depth), "--model.hidden_size", str(run.shape.width),
                 "--model.num_attention_heads", str(run.shape.width // self.head_size),
                 "--train.steps", str(self.steps), "--checkpoint.at_steps", str(saved),
                 "--probe.every", str(self.probe_every), "--probe.num_batches", str(self.first_batches)]  # fmt: skip
        if self.scale == "tiny":
            # A tenth of a short run; the config's number of steps for a long one.
            words += ["--train.test_every", "0", "--schedule.warmup_steps", str(min(20, max(1, self.steps // 10)))]
        return words


def scaled_recipe(recipe: Recipe, width: int, base_width: int) -> Recipe:
    """The rate of an optimizer at another width, by μP's rule for hidden matrices.

    LION's and AdamW's rates are proportional to 1/width, SGD's is constant. μP has other rules for embeddings, biases and
    gains, and scales the initialization and the output too; here the rule is applied to all parameters. The weight decay
    is the same at all widths.

    Source: Yang et al., "Tensor Programs V" (arXiv 2203.03466), table 3: hidden weights. LION follows Adam there, since
    both take steps whose size does not depend on that of the gradient.

    Example:
        >>> scaled_recipe(Recipe("lion", 3e-4, 0.1), 32, 128).lr, scaled_recipe(Recipe("sgd", 0.3, 0.0), 32, 128).lr
        (0.0012, 0.3)
    """
    factor = base_width / width if recipe.optimizer in INVERSE_WIDTH else 1.0
    return replace(recipe, lr=float(f"{recipe.lr * factor:.6g}"))


DEFAULTS: dict[Scale, dict[str, Any]] = {
    "tiny": {
        "widths": "32,48,64,96,128,192,256", "depths": "4", "head_size": 16, "base_width": 128,
        "optimizers": "lion,sgd,adamw", "seeds": "1,2", "steps": 400, "first_batches": 32, "max_batches": 256,
    },
    "full": {
        "widths": "256,384,512,768,1024,1536,2048", "depths": "12", "head_size": 64, "base_width": 768,
        "optimizers": "lion,sgd", "seeds": "1", "steps": 10_000, "first_batches": 100, "max_batches": 1000,
    },
}  # fmt: skip
"""Values of flags that were not given, by scale."""

_RECIPES: dict[Scale, Sequence[Recipe]] = {"tiny": TUNED["gpt2"], "full": PAPER}


def family_of(given: dict[str, Any], scale: Scale) -> Family:
    """The family that the flags ask for.

    Args:
        given: values of the flags by name, such as "widths": "32,64"; None for those that were not given.
        scale: "tiny" or "full".

    Raises:
        ConfigError: a value is invalid; the message begins with the flag.
    """
    values = DEFAULTS[scale] | {key: value for key, value in given.items() if value is not None}
    widths, depths = (_whole_numbers(f"--{key}", values[key]) for key in ("widths", "depths"))
    seeds = _whole_numbers("--seeds", values["seeds"], least=0)
    for flag in ("head_size", "base_width", "steps", "first_batches"):
        if values[flag] < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {values[flag]}: must be at least 1")
    head = values["head_size"]
    if wrong := [width for width in widths if width % head]:
        raise ConfigError(
            f"--widths {values['widths']}: {wrong[0]} is not a multiple of the head size {head}; give other widths or --head-size"
        )
    if len(widths) * len(depths) < 2:
        raise ConfigError(
            f"--widths {values['widths']}: one model has no exponent; give at least 2 widths, and 4 for a verdict"
        )
    if not 0 < values["noise_share"] < 1:
        raise ConfigError(f"--noise-share {values['noise_share']:g}: must be between 0 and 1, such as 0.05")
    return Family(
        scale=scale, widths=widths, depths=depths, head_size=head, base_width=values["base_width"],
        recipes=_recipes(values["optimizers"], values.get("lr"), scale), seeds=seeds, steps=values["steps"],
        measure_at=_measured_steps(values.get("measure_at"), values["steps"]), noise_share=values["noise_share"],
        first_batches=_first_batches(values["first_batches"]), max_batches=_max_batches(values),
    )  # fmt: skip


def _whole_numbers(flag: str, text: str, *, least: int = 1) -> tuple[int, ...]:
    """The numbers of a list such as 32,64, ascending.

    Raises:
        ConfigError: another form, a number below `least`, or one that is given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) and int(part) >= least for part in parts):
        raise ConfigError(f"{flag} {text}: expected whole numbers of at least {least} separated by commas")
    numbers = sorted(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{flag} {text}: a number is given twice")
    return tuple(numbers)


def _recipes(names: str, rates: str | None, scale: Scale) -> tuple[Recipe, ...]:
    chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in OPTIMIZER_NAMES]:
        raise ConfigError(
            f"--optimizers {names}: '{unknown[0]}' is not an optimizer; expected some of {', '.join(OPTIMIZER_NAMES)}"
        )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--optimizers {names}: an optimizer is given twice")
    given = _rates(rates, chosen) if rates else {}
    known = {recipe.optimizer: recipe for recipe in _RECIPES[scale]}
    if missing := [name for name in chosen if name not in known and name not in given]:
        raise ConfigError(
            f"--optimizers {names}: {missing[0]} has no known rate at the {scale} scale; give --lr {missing[0]}=RATE"
        )
    default = Recipe("", 0.0, known["lion"].weight_decay)
    found = [replace(known.get(name, default), optimizer=name) for name in chosen]
    return tuple(replace(recipe, lr=given.get(recipe.optimizer, recipe.lr)) for recipe in found)


def _rates(text: str, chosen: Sequence[str]) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if name not in chosen or not 0 < rate < math.inf:
            raise ConfigError(
                f"--lr {text}: expected OPTIMIZER=RATE,… such as {chosen[0]}=1e-3, for {' or '.join(chosen)}"
            )
        found[name] = rate
    return found


def _measured_steps(text: str | None, steps: int) -> tuple[int, ...]:
    if text is None:
        return (0, steps // 2, steps) if steps % 2 == 0 else (0, steps)
    found = _whole_numbers("--measure-at", text, least=0)
    if found[-1] > steps:
        raise ConfigError(f"--measure-at {text}: {found[-1]} is after the last step, {steps}")
    interval = math.gcd(*found)
    if interval and steps // interval > MOST_PROBES:
        raise ConfigError(
            f"--measure-at {text}: the trainings probe at multiples of {interval}, the steps' common divisor, which are "
            f"{steps // interval} in {steps} steps; choose steps with at most {MOST_PROBES}"
        )
    return found


def _first_batches(number: int) -> int:
    if number < 8:
        raise ConfigError(f"--first-batches {number}: must be at least 8, to estimate the noise")
    return number


def _max_batches(values: dict[str, Any]) -> int | Literal["all"]:
    most, first = values["max_batches"], values["first_batches"]
    if most == "all":
        return "all"
    if int(most) < first:
        raise ConfigError(f"--max-batches {most}: must be all, or at least the {first} batches of the first probe")
    return int(most)
