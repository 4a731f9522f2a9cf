"""Rate and decay for `--optimizer.name` on a config that was written for another optimizer.

A config's learning rate belongs to its optimizer: LION's rate lets SGD stand still. If a command changes the optimizer
and gives no rate, rate and decay are converted, and a note reports both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from megatron_lion.config import OptimizerConfig

RATE_OF_LION = {"lion": 1.0, "adamw": 3.0, "sgd": 1000.0}
"""Learning rate of each optimizer as a multiple of LION's: the ratios of the best rates of three grids on small GPT-2
models (benchmarks/results/rates_gpt2_tiny.md, rates_demo.md: lion 3e-4, adamw 1e-3, sgd 0.3), rounded."""


def switched(
    before: OptimizerConfig, chosen: OptimizerConfig, given: Collection[str], where: str
) -> tuple[OptimizerConfig, str]:
    """Returns the settings of the optimizer that a command chose instead of its config's, and a note for the user.

    Without `lr` among the given settings, the rate is converted with `RATE_OF_LION`. `weight_decay`, unless given, is
    converted so that lr x weight_decay stays the same, as from AdamW to LION; SGD gets 0, because at its rates the usual
    decay would shrink the weights by percents a step.

    Args:
        before: the config's settings, without the command's flags.
        chosen: the settings with the flags.
        given: names of the optimizer's fields that the command gives.
        where: the config, for the note.

    Returns:
        The settings, and the note; "" if the optimizer is the config's.

    Example:
        >>> lion = OptimizerConfig(name="lion", lr=3e-4, weight_decay=0.1)
        >>> sgd, _ = switched(lion, replace(lion, name="sgd"), ["name"], "tiny.yaml")
        >>> sgd.lr, sgd.weight_decay
        (0.3, 0.0)
    """
    if before.name == chosen.name:
        return chosen, ""
    if "lr" in given:
        if "weight_decay" in given or chosen.weight_decay == 0:
            return chosen, ""
        return chosen, (
            f"note: weight_decay {chosen.weight_decay:g} is that of {where} for {before.name} and stays; "
            f"give --optimizer.weight_decay to choose one for {chosen.name}"
        )
    # A rate of 0 is converted to 0.
    lr = _rounded(before.lr * RATE_OF_LION[chosen.name] / RATE_OF_LION[before.name])
    decay = chosen.weight_decay
    if "weight_decay" not in given:
        decay = 0.0 if chosen.name == "sgd" or not lr else _rounded(before.weight_decay * before.lr / lr)
    return replace(chosen, lr=lr, weight_decay=decay), (
        f"note: {where} has lr {before.lr:g} and weight_decay {before.weight_decay:g} for {before.name}; for {chosen.name} "
        f"they become {lr:g} and {decay:g}; give --optimizer.lr and --optimizer.weight_decay to choose others"
    )


_USERS = {
    "betas": ("lion", "adamw"),
    "momentum": ("sgd",),
    "coupled_weight_decay": ("sgd",),
    "eps": ("adamw",),
    "init_exp_avg": ("lion",),
}
"""The optimizers that read a setting, if it is not all of them. config_checks.py refuses the others, such as master_weights."""


def unused(name: str, given: Collection[str]) -> str:
    """Returns a note on the settings among those that a command gives that its optimizer does not read, or "".

    Example:
        >>> unused("lion", ["lr", "eps"])
        'note: optimizer.eps has no effect with lion'
    """
    found = [f"optimizer.{key}" for key in _USERS if key in given and name not in _USERS[key]]
    return f"note: {' and '.join(found)} {'has' if len(found) == 1 else 'have'} no effect with {name}" if found else ""


def _rounded(value: float) -> float:
    # Six digits: 3e-4 x 3 is 0.0008999999999999999 otherwise, in config.yaml and in every table.
    return float(f"{value:.6g}")
