"""What LION's relatives share as torch optimizers: state, saving and loading, groups, closures, and refused arguments."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_cases import same_bits
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from megatron_lion.family.clion import CLion
from megatron_lion.family.lion_kappa import LionKappa
from megatron_lion.family.mlorc_lion import MLorcLion
from megatron_lion.family.plain_rule import PlainRule
from megatron_lion.family.sto_sign_sgd import StoSignSGD

RULES: dict[str, Callable[..., PlainRule]] = {
    "clion": lambda params, **settings: CLion(params, threshold=0.02, **settings),
    "mlorc_lion": lambda params, **settings: MLorcLion(params, rank=2, **settings),
    "sto_sign_sgd": lambda params, **settings: StoSignSGD(params, momentum=0.5, **settings),
    "lion_kappa": lambda params, **settings: LionKappa(params, kappa="huber", delta=0.5, **settings),
}
rule_names = pytest.mark.parametrize("name", sorted(RULES))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(6, 4), (5,), ()]]


def train(optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def all_state(optimizer) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value for param in params for _, value in sorted(optimizer.state[param].items())]


@rule_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_state_continues_bit_for_bit(name, dtype, tmp_path):
    """Also after a file, with float32 state of bfloat16 parameters, which torch's own load would round."""
    params = parameters(dtype)
    optimizer = RULES[name](params, lr=0.05, weight_decay=0.1)
    train(optimizer, 5)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    twin = RULES[name](twins, lr=9.0)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(optimizer, 5, seed=1)
    train(twin, 5, seed=1)
    pairs = list(zip(params, twins, strict=True))
    assert all(same_bits(left.detach(), right.detach()) for left, right in pairs)
    assert all(torch.equal(left, right) for left, right in zip(all_state(optimizer), all_state(twin), strict=True))
    assert {value.dtype for value in all_state(twin)} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    } | ({torch.float32} if twin.COUNTS_STEPS else set())


@rule_names
def test_a_copy_continues_bit_for_bit(name):
    optimizer = RULES[name](parameters(), lr=0.05)
    train(optimizer, 3)
    twin = copy.deepcopy(optimizer)
    train(optimizer, 3, seed=1)
    train(twin, 3, seed=1)
    pairs = zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True)
    assert all(same_bits(left.detach(), right.detach()) for left, right in pairs)


@rule_names
def test_a_load_that_fails_changes_nothing(name):
    optimizer = RULES[name](parameters(), lr=0.05)
    train(optimizer, 2)
    before, state = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    whole = dict.fromkeys(optimizer.WHOLE[:1], "other")
    broken: list[tuple[dict[str, Any], str]] = [
        ({**state, "param_groups": [{**state["param_groups"][0], "lr": -1.0}]}, "lr = -1.0"),
        ({**state, "param_groups": [{**state["param_groups"][0], "amsgrad": True}]}, "amsgrad"),
        ({**state, "param_groups": [{k: v for k, v in state["param_groups"][0].items() if k != "lr"}]}, "no lr"),
        ({**state, "state": {**state["state"], 0: {"exp_avg_sq": torch.zeros(6, 4)}}}, "exp_avg_sq"),
        ({**state, "state": {**state["state"], 0: 3}}, "int"),
        ({**state, "state": {**state["state"], 0: {k: torch.zeros(9, 9) for k in state["state"][0]}}}, "shape|step"),
        ({**state, "state": {**state["state"], 77: state["state"][0]}}, "77"),
        ({**state, "param_groups": [{**state["param_groups"][0], "params": [0]}]}, "match the size|in no group"),
    ]
    if whole:
        broken.append(({**state, "param_groups": [{**state["param_groups"][0], **whole}]}, "needs one value"))
    for content, message in broken:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(content)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(
            torch.equal(value, before["state"][number][key])
            for number, own in after["state"].items()
            for key, value in own.items()
        )


def with_entry(state: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A state dict with another value of one state of parameter 1."""
    return {**state, "state": {**state["state"], 1: {**state["state"][1], name: value}}}


@rule_names
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_state_that_is_not_of_floats_is_refused(name, dtype):
    optimizer = RULES[name](parameters(), lr=0.05)
    train(optimizer, 1)
    state = optimizer.state_dict()
    for key in set(state["state"][1]) - {"step"}:
        with pytest.raises(ValueError, match=f"{key} of parameter 1 is {dtype}"):
            optimizer.load_state_dict(with_entry(state, key, torch.zeros(5, dtype=dtype)))


BAD_STEPS = ["x", "5", None, -1, -5.5, 2.5, True, [3], float("nan"), float("inf"), torch.tensor(-1.0), torch.ones(2)]


@pytest.mark.parametrize("name", ["mlorc_lion", "sto_sign_sgd"])
@pytest.mark.parametrize("step", BAD_STEPS)
def test_a_step_that_is_no_count_is_refused(name, step):
    optimizer = RULES[name](parameters(), lr=0.05)
    train(optimizer, 2)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=f"step of parameter 1 is {re.escape(repr(step))}"):
        optimizer.load_state_dict(with_entry(state, "step", step))
    assert [float(optimizer.state[param]["step"]) for param in optimizer.param_groups[0]["params"]] == [2, 2, 2]


@pytest.mark.parametrize(
    "step", [0, 7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float64)]
)
def test_a_step_of_any_number_type_is_loaded(step):
    optimizer = RULES["sto_sign_sgd"](parameters(), lr=0.05)
    train(optimizer, 2)
    optimizer.load_state_dict(with_entry(optimizer.state_dict(), "step", step))
    found = optimizer.state[optimizer.param_groups[0]["params"][1]]["step"]
    assert (float(found), found.dtype, found.shape) == (float(step), torch.float32, ())
    train(optimizer, 1)
    assert step is not found
    assert float(found) == float(step) + 1


@rule_names
def test_a_hook_that_fails_leaves_the_old_state(name):
    optimizer, other = RULES[name](parameters(), lr=0.05), RULES[name](parameters(), lr=0.5)
    train(optimizer, 2)
    train(other, 3, seed=1)
    before = copy.deepcopy(optimizer.state_dict())

    def fail(_: torch.optim.Optimizer) -> None:
        raise OSError("a hook")

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(OSError, match="a hook"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())


@rule_names
def test_groups_have_their_own_rates_and_frozen_parameters_stay(name):
    first, second, third = parameters()
    optimizer = RULES[name]([{"params": [first]}, {"params": [second], "lr": 0.0}, {"params": [third]}], lr=0.1)
    kept = [param.detach().clone() for param in (first, second, third)]
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    assert optimizer.step(lambda: 4.0) == 4.0
    assert not torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])
    assert torch.equal(third, kept[2])
    assert third not in optimizer.state


@rule_names
def test_gradients_of_another_memory_order_give_the_same_step(name):
    plain, transposed = (torch.nn.Parameter(value) for value in (torch.zeros(4, 6), torch.zeros(6, 4).t()))
    gradient = torch.linspace(-1, 1, 24).view(4, 6)
    for param, grad in ((plain, gradient), (transposed, gradient)):
        param.grad = grad.clone()
        RULES[name]([param], lr=0.1).step()
    torch.testing.assert_close(plain.detach(), transposed.detach().contiguous(), rtol=1e-5, atol=1e-6)


@rule_names
def test_torchs_request_for_the_state_is_no_step(name):
    """torch.distributed.checkpoint takes a step at rate 0 with zero gradients to create missing state."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = RULES[name](model.parameters(), lr=0.1)
    kept = [param.detach().clone() for param in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(state) == {"weight", "bias"}
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), kept, strict=True))
    assert not any(bool(value.any()) for value in all_state(optimizer))


@rule_names
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": "1e-3"}, "convert the text"),
        ({"weight_decay": float("nan")}, "weight_decay = nan"),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        RULES[name](parameters(), **settings)


@rule_names
def test_wrong_parameters_are_refused(name):
    with pytest.raises(TypeError, match="iterable of tensors"):
        RULES[name](torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="float32"):
        RULES[name]([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = RULES[name](parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no params"):
        optimizer.add_param_group({"lr": 0.1})
    if optimizer.WHOLE:
        with pytest.raises(ValueError, match="needs one value"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], optimizer.WHOLE[0]: "other"})
    assert len(optimizer.param_groups) == 1
    param = optimizer.param_groups[0]["params"][1]
    train(optimizer, 1)
    param.grad = torch.zeros(5).to_sparse()
    with pytest.raises(ValueError, match="turn off `sparse=True`"):
        optimizer.step()
    param.data = torch.zeros(9)
    param.grad = torch.zeros(9)
    with pytest.raises(ValueError, match="parameter 1 in group 0"):
        optimizer.step()
