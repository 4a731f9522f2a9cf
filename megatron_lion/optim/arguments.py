"""Checks of an optimizer's arguments for mistakes that torch answers with an unrelated exception, or not at all.

lion.py and update.py work without this file; they check the numbers themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch

# Keys that a group of LION cannot have, with the remedy: settings of the whole optimizer, and other names of a group's own.
_WHOLE = "holds for the whole optimizer; give it to Lion(…) itself"
_GROUP_ERRORS = {
    **dict.fromkeys(
        ("implementation", "master_weights", "momentum", "momentum_dtype", "count_steps", "sum_agreement"), _WHOLE
    ),
    **dict.fromkeys(("learning_rate", "lrs"), "its name is lr"),
    **dict.fromkeys(("wd", "decay"), "its name is weight_decay"),
    **dict.fromkeys(("beta", "beta1", "beta2"), "needs betas = (β1, β2)"),
}
_SETTINGS = ("weight_decay", "betas", "maximize", "cautious")
"""The settings of a group whose misspelling is recognised; `lr` is too short for it."""


def check_iterable(params: Any) -> None:
    """Raises TypeError if the parameters cannot be iterated over, or are a model."""
    # A model such as Sequential can be iterated over, but has modules and no tensors.
    if isinstance(params, torch.nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"params is {type(params).__name__}: should be an iterable of tensors or groups, such as model.parameters()"
        )


def check_flags(**flags: Any) -> None:
    """Raises ValueError if a setting is neither True nor False; a text such as "no" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: needs True or False")


def check_function(name: str, value: Any) -> None:
    """Raises ValueError if a setting is neither a function nor None."""
    if not (value is None or callable(value)):
        raise ValueError(f"{name} = {value!r}: needs a function, or None")


def check_new_group(group: Any) -> None:
    """Raises ValueError or TypeError if a new group has no usable `params`. torch raises TypeError if it is not a dict."""
    if not isinstance(group, dict):
        return
    if "params" not in group:
        raise ValueError(f"a group with {', '.join(map(str, group)) or 'no keys'} has no params: needs its tensors")
    check_iterable(group["params"])


def check_new_lion_group(group: Any) -> None:
    """As `check_new_group`; also raises ValueError if the group has a setting that a group of LION cannot have."""
    check_new_group(group)
    for name in [name for name in _GROUP_ERRORS if isinstance(group, dict) and name in group]:
        raise ValueError(f"{name} = {group[name]!r} in a group: {_GROUP_ERRORS[name]}")
    for name in group if isinstance(group, dict) else ():
        # Other keys are kept for schedulers and the like; one that is almost a setting is a mistake without effect.
        close = difflib.get_close_matches(str(name), _SETTINGS, n=1, cutoff=0.85)
        if close and name not in _SETTINGS:
            raise ValueError(f"{name} = {group[name]!r} in a group: did you mean {close[0]}?")
    if isinstance(group, dict) and group.get("differentiable"):
        raise ValueError("differentiable = True in a group: needs False, because LION's step has no gradient")
