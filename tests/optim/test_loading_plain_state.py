"""A float32 state without master weights, loaded over the packed state of an optimizer that has already stepped."""

from __future__ import annotations

import itertools

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, MASTERS, MOMENTA, same_bits, same_state
from reference import LionFloat32

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
SIZES = (70, 33)
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def build(dtype, implementation="foreach", **settings):
    params = [torch.nn.Parameter(torch.linspace(-1, 2, size, device=DEVICE).to(dtype)) for size in SIZES]
    return Lion(params, implementation=implementation, **HYPER, **settings), params


def train(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.decoupled_grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        optimizer.step()


def put_in(params, values):
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def plain_state(optimizer, momenta):
    """What a plain LION saves: float32 momentum and nothing else."""
    state = {number: {"exp_avg": value.clone()} for number, value in enumerate(momenta)}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def some_weights(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in SIZES]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", list(itertools.product(MASTERS, MOMENTA)), ids="/".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stepped_optimizer_becomes_one_that_was_built_from_the_state(implementation, mode, dtype):
    settings = {"master_weights": mode[0], "momentum": mode[1], "implementation": implementation}
    weights, momenta = some_weights(1, dtype), some_weights(2, torch.float32)
    stepped, params = build(dtype, **settings)
    train(stepped, params, 3, seed=3)
    fresh, others = build(dtype, **settings)
    for optimizer, own in ((stepped, params), (fresh, others)):
        put_in(own, weights)
        optimizer.load_state_dict(plain_state(optimizer, momenta))
        for param, weight, momentum in zip(own, weights, momenta, strict=True):
            assert same_bits(param.detach(), weight)
            if mode[0] != "none":
                # Nothing is left of a remainder: the master weight is the loaded weight, to the last bit.
                assert same_bits(optimizer.get_unscaled_state(param, "master_param").detach(), weight.float())
            kept = optimizer.get_unscaled_state(param, "exp_avg")
            # bfloat16 keeps 8 bits; int8 half a step of max/127 and its scale's rounding.
            relative = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.502 / 127}[mode[1]]
            assert (kept - momentum).abs().max() <= relative * momentum.abs().max()
    assert same_state(stepped, fresh)
    train(stepped, params, 3, seed=4)
    train(fresh, others, 3, seed=4)
    assert same_state(stepped, fresh)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split32_goes_on_from_a_plain_state_as_a_float32_master_would(implementation):
    weights, momenta = some_weights(1, torch.bfloat16), some_weights(2, torch.float32)
    optimizer, params = build(torch.bfloat16, implementation, master_weights="split32")
    train(optimizer, params, 3, seed=3)
    put_in(params, weights)
    optimizer.load_state_dict(plain_state(optimizer, momenta))
    references = [LionFloat32(weight.float().cpu().numpy(), **HYPER) for weight in weights]
    for reference, momentum in zip(references, momenta, strict=True):
        reference.exp_avg = momentum.cpu().numpy()
    train(optimizer, params, 4, seed=4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        for reference, size in zip(references, SIZES, strict=True):
            reference.step(torch.randn(size, generator=generator).numpy())
    for param, reference in zip(params, references, strict=True):
        master = optimizer.get_unscaled_state(param, "master_param").cpu()
        assert same_bits(master, torch.from_numpy(reference.theta))
        assert same_bits(optimizer.state[param]["exp_avg"].cpu(), torch.from_numpy(reference.exp_avg))


@pytest.mark.parametrize("mode", list(itertools.product(MASTERS, MOMENTA)), ids="/".join)
def test_a_parameter_without_loaded_state_starts_from_the_beginning(mode):
    settings = {"master_weights": mode[0], "momentum": mode[1], "count_steps": True}
    stepped, params = build(torch.bfloat16, **settings)
    train(stepped, params, 3, seed=3)
    fresh, others = build(torch.bfloat16, **settings)
    weights, momenta = some_weights(1, torch.bfloat16), some_weights(2, torch.float32)
    for optimizer, own in ((stepped, params), (fresh, others)):
        put_in(own, weights)
        state = plain_state(optimizer, momenta)
        del state["state"][1]
        optimizer.load_state_dict(state)
        train(optimizer, own, 1, seed=4)
    assert same_state(stepped, fresh)
    assert [stepped.state[param]["step"].item() for param in params] == [1.0, 1.0]
