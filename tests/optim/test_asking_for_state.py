"""Software that asks for the optimizer's state before the first step, as torch.distributed.checkpoint does by a step at rate 0."""

from __future__ import annotations

import copy

import pytest
import torch
from distributed import run_distributed
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits, same_state
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
MODES = (("none", "fp32"), ("split32", "bf16"), ("fp32", "int8"))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5, device=DEVICE, dtype=dtype)


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_asking_changes_nothing_of_what_follows(implementation, rate, mode):
    """Not the first gradient, which m_0 = g_1 is to be, nor the count of steps, nor a weight."""
    dtype = torch.float32 if mode[0] == "none" else torch.bfloat16
    runs = []
    for asks in (False, True):
        model = network(dtype)
        lr = 0.1 if rate == "number" else torch.tensor(0.1, device=DEVICE)
        settings = {"master_weights": mode[0], "momentum": mode[1], "implementation": implementation}
        hyper = {"betas": (0.9, 0.95), "weight_decay": 0.1, "init_exp_avg": "first_gradient", "count_steps": True}
        optimizer = Lion(model.parameters(), lr=lr, **hyper, **settings)
        if asks:
            before = copy.deepcopy(model.state_dict())
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert set(state) == {"weight", "bias"}
            assert all(float(entry["step"]) == 0 for entry in state.values())
            assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
        train(model, optimizer, 1)
        if mode == MODES[0]:
            generator = torch.Generator().manual_seed(1)
            for param in model.parameters():  # m_1 = β2 g_1 + (1-β2) g_1
                first = torch.randn(param.shape, generator=generator).to(DEVICE)
                torch.testing.assert_close(optimizer.state[param]["exp_avg"], first)
        train(model, optimizer, 2)
        assert all(float(optimizer.state[param]["step"]) == 3 for param in model.parameters())
        runs.append(optimizer)
    assert same_state(*runs)


def test_a_state_that_was_asked_for_may_be_loaded_and_goes_on_as_saved():
    model, other = network(), network()
    kept = Lion(model.parameters(), lr=0.1, init_exp_avg="first_gradient")
    again = Lion(other.parameters(), lr=0.5, init_exp_avg="first_gradient")
    for options in (
        StateDictOptions(),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ):
        state = copy.deepcopy(get_optimizer_state_dict(model, kept, options=options))
        set_optimizer_state_dict(other, again, state, options=options)
        assert same_state(kept, again)
        assert again.param_groups[0]["lr"] == 0.1
        train(model, kept, 2)
        train(other, again, 2)
        assert same_state(kept, again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_a_first_step_at_rate_0_without_any_gradient_is_passed_over(implementation):
    settings = {"implementation": implementation, "init_exp_avg": "first_gradient", "count_steps": True}

    def after(lr, *gradients):
        params = [torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
        optimizer = Lion(params, lr=lr, weight_decay=0.5, betas=(0.5, 0.5), **settings)
        for pair in gradients:
            for param, grad in zip(params, pair, strict=True):
                param.grad = torch.full((3,), grad, device=DEVICE)
            optimizer.step()
        entry = optimizer.state[params[1]]
        return params[1][0].item(), entry["exp_avg"][0].item(), entry["step"].item()

    # A warm-up that begins at rate 0 with a gradient: the parameter whose own is 0 begins there as well, at g_1 = 0.
    assert after(0.0, (1.0, 0.0), (1.0, 4.0)) == (1.0, 2.0, 2.0)
    assert after(0.0, (0.0, float("nan")))[2] == 1.0
    # At a rate above 0 a gradient of 0 is a gradient, and the weight decays.
    assert after(0.5, (0.0, 0.0)) == (0.75, 0.0, 1.0)
    # Later steps at rate 0 shrink the momentum as ever: 4, then a half of it.
    assert after(0.0, (4.0, 4.0), (0.0, 0.0)) == (1.0, 2.0, 2.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ranks_call_a_collective_equally_often_though_one_has_no_gradient(implementation):
    """sum_agreement may be a collective; the gradients of one rank may all be 0."""
    calls = {1.0: 0, 0.0: 0}
    for gradient in calls:

        def sum_agreement(params, agreement, gradient=gradient):
            assert agreement.shape == (len(params), 2) == (1, 2)
            calls[gradient] += 1

        param = torch.nn.Parameter(torch.ones(4, device=DEVICE))
        optimizer = Lion([param], lr=0.0, cautious=True, sum_agreement=sum_agreement, implementation=implementation)
        param.grad = torch.full((4,), gradient, device=DEVICE)
        for _ in range(2):
            optimizer.step()
    assert calls == {1.0: 2, 0.0: 2}


def fsdp(rank: int) -> bool:
    from torch.distributed.fsdp import fully_shard

    ends = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 5)
        fully_shard(model)
        optimizer = Lion(model.parameters(), lr=0.01, init_exp_avg="first_gradient")
        if asks:
            get_optimizer_state_dict(model, optimizer)
        for number in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            optimizer.step()
        ends.append([(p.detach().to_local(), optimizer.state[p]["exp_avg"].to_local()) for p in model.parameters()])
    return all(same_bits(a, b) for one, two in zip(*ends, strict=True) for a, b in zip(one, two, strict=True))


def test_fsdp2_shards_keep_their_first_gradient():
    assert run_distributed(fsdp, 2) == [True, True]
