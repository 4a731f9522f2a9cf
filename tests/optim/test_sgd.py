"""SGD, the paper's baseline: both kinds of weight decay against other implementations, groups, and empty shards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.optim.lion import Lion
from megatron_lion.optim.sgd import Sgd


def gradients(steps: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, size))


@given(
    lr=st.floats(1e-4, 1.0), momentum=st.sampled_from([0.0, 0.5, 0.9]), decay=st.sampled_from([0.0, 0.01, 0.3]),
    coupled=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@examples(60)
def test_steps_are_the_equations_in_numpy(lr, momentum, decay, coupled, seed):
    """Decoupled: θ ← θ(1 - ηλ) - ηm; coupled: the gradient gets λθ before the momentum m ← μm + g."""
    theta, m = np.linspace(-2, 2, 7), np.zeros(7)
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = Sgd([param], lr=lr, momentum=momentum, weight_decay=decay, coupled_weight_decay=coupled)
    for g in gradients(4, 7, seed):
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m = momentum * m + (g + decay * theta if coupled else g)
        theta = theta * (1 if coupled else 1 - lr * decay) - lr * m
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(optimizer.state[param]["momentum_buffer"].numpy(), m, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_coupled_decay_is_torchs(momentum):
    values, grads = torch.linspace(-1, 1, 9), gradients(5, 9, 1)
    ours, theirs = (torch.nn.Parameter(values.clone()) for _ in range(2))
    pair = (
        Sgd([ours], lr=0.1, momentum=momentum, weight_decay=0.2, coupled_weight_decay=True),
        torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=0.2),
    )
    for g in grads:
        for param, optimizer in zip((ours, theirs), pair, strict=True):
            param.grad = torch.from_numpy(g).float()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_without_decay_it_is_torchs_bit_for_bit():
    values, grads = torch.linspace(-1, 1, 9), gradients(5, 9, 2)
    ours, theirs = (torch.nn.Parameter(values.clone()) for _ in range(2))
    pair = (Sgd([ours], lr=0.3, momentum=0.9), torch.optim.SGD([theirs], lr=0.3, momentum=0.9))
    for g in grads:
        for param, optimizer in zip((ours, theirs), pair, strict=True):
            param.grad = torch.from_numpy(g).float()
            optimizer.step()
    assert torch.equal(ours.detach().view(torch.int32), theirs.detach().view(torch.int32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": -0.1}, "lr = -0.1: needs a finite number"), ({"lr": float("nan")}, "lr = nan"), ({"lr": float("inf")}, "lr = inf"),
     ({"lr": torch.tensor([0.1, 0.2])}, "lr is a tensor of 2 elements"), ({"weight_decay": -1.0}, "weight_decay = -1.0"),
     ({"weight_decay": float("nan")}, "weight_decay = nan"), ({"momentum": 1.0}, "momentum = 1.0"),
     ({"momentum": -0.1}, "momentum = -0.1"), ({"momentum": float("nan")}, "momentum = nan")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_wherever_they_come_from(settings, message):
    weight, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        Sgd([weight], **{"lr": 0.1, **settings})
    with pytest.raises(ValueError, match=message):
        Sgd([{"params": [weight], **settings}], lr=0.1)
    optimizer = Sgd([weight], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], **settings})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0].update(settings)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_rate_may_be_a_tensor():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = Sgd([weight], lr=torch.tensor(0.5), momentum=0.0)
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"].fill_(rate)
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == 0.25


def test_groups_have_their_own_rate_and_decay():
    first, second, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [first], "lr": 0.5, "weight_decay": 0.1}, {"params": [second, unused], "weight_decay": 0.0}]
    optimizer = Sgd(groups, lr=0.25, momentum=0.0, weight_decay=0.9)
    first.grad, second.grad = torch.full((2,), 2.0), torch.full((2,), 4.0)
    optimizer.step()
    assert first.tolist() == pytest.approx([1 * (1 - 0.05) - 1.0] * 2)
    assert second.tolist() == [0.0, 0.0]
    assert unused.tolist() == [1.0, 1.0]
    assert unused not in optimizer.state


def test_empty_shards_and_groups_without_gradients_are_passed_over():
    empty, idle, other = (
        torch.nn.Parameter(torch.ones(0)),
        torch.nn.Parameter(torch.ones(1)),
        torch.nn.Parameter(torch.ones(1)),
    )
    optimizer = Sgd([{"params": [idle]}, {"params": [empty]}, {"params": [other]}], lr=1.0, momentum=0.9)
    empty.grad, other.grad = torch.ones(0), torch.ones(1)
    optimizer.step()
    assert (idle.item(), other.item()) == (1.0, 0.0)


def test_a_closure_is_evaluated_with_gradients():
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = Sgd([param], lr=0.5, momentum=0.0)

    def closure() -> torch.Tensor:
        loss = (param**2).sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure).item() == 9.0
    assert param.item() == 0.0


def saved_by(make, dtype=torch.float32):
    """The state of an optimizer after one step of a (3, 4) weight."""
    weight = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
    weight.grad = torch.full_like(weight, 2)
    optimizer = make([weight])
    optimizer.step()
    return optimizer.state_dict()


def torch_sgd(**settings):
    return lambda params: torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, **settings})


REFUSED = {
    "nesterov": (torch_sgd(nesterov=True), "nesterov = True"),
    "maximize": (torch_sgd(maximize=True), "maximize = True"),
    "dampening": (torch_sgd(dampening=0.5), r"dampening = 0\.5"),
    "torch's coupled decay": (torch_sgd(weight_decay=0.5), "coupled_weight_decay = True in the state, False in"),
    "coupled": (
        lambda params: Sgd(params, lr=0.1, coupled_weight_decay=True),
        "coupled_weight_decay = True in the state",
    ),
    "AdamW": (lambda params: torch.optim.AdamW(params, lr=0.1), "has no momentum"),
    "RMSprop": (lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9), "alpha, centered, eps, which Sgd"),
    "LION": (lambda params: Lion(params, lr=0.1), "has no momentum"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_of_another_step_is_refused_and_changes_nothing(case):
    make, words = REFUSED[case]
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Sgd([weight], lr=0.25)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved_by(make))
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, before["state"][0]["momentum_buffer"])
    assert optimizer.state[weight]["momentum_buffer"] is momentum


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}])
def test_a_state_of_torch_that_steps_alike_continues(settings):
    theirs = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch_sgd(**settings)([theirs])
    theirs.grad = torch.full_like(theirs, 2)
    optimizer.step()
    ours = torch.nn.Parameter(theirs.detach().clone())
    continued = Sgd([ours], lr=0.7)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    ours.grad = theirs.grad
    optimizer.step()
    continued.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "state of parameter 0 is NoneType"),
        (
            {"momentum_buffer": torch.zeros(1, 4)},
            r"is torch\.float32, shape \(1, 4\); the parameter has shape \(3, 4\)",
        ),
        ({"momentum_buffer": 3}, "momentum_buffer of parameter 0 is int"),
        ({"momentum_buffer": torch.zeros(3, 4), "exp_avg": torch.zeros(3, 4)}, "with exp_avg"),
    ],
)
def test_a_momentum_of_another_model_is_refused(entry, words):
    optimizer = Sgd([torch.nn.Parameter(torch.ones(3, 4))], lr=0.25)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict({**state, "state": {0: entry}})
    assert not optimizer.state


@pytest.mark.parametrize("option", [{"nesterov": True}, {"maximize": True}, {"dampening": 0.5}])
def test_a_group_with_an_option_of_torch_is_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} = .*torch"):
        Sgd([{"params": [torch.nn.Parameter(torch.ones(2))], **option}], lr=0.1)
