"""Groups and states that `Lion` refuses as they are added or loaded, and which then leave it as it was."""

from __future__ import annotations

import pytest
import torch

from megatron_lion.optim.lion import Lion


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", 0.9), ("betas", ("a", "b")), ("betas", None), ("betas", (float("nan"), 0.9)), ("lr", "x"), ("lr", "1"),
        ("lr", None), ("lr", 1j), ("lr", torch.tensor(float("nan"))), ("lr", torch.tensor(-1.0)), ("lr", float("inf")),
        ("weight_decay", None), ("maximize", "no"), ("maximize", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_group_with_an_impossible_setting_is_not_added(name, value):
    optimizer = Lion([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=f"^{name} = .*needs"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "^state of parameter 0: NoneType, not a dict"),
        ({"exp_avg": torch.zeros(3, 4)}, r"exp_avg of shape \(3, 4\) for a parameter of shape \(12,\)"),
    ],
    ids=str,
)
def test_a_state_of_another_form_is_refused(entry, words):
    weight = torch.nn.Parameter(torch.ones(12))
    optimizer = Lion([weight])
    weight.grad = torch.ones(12)
    optimizer.step()
    momentum = optimizer.state[weight]["exp_avg"]
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
    assert optimizer.state[weight]["exp_avg"] is momentum
