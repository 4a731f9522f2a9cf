"""Cautious LION: only elements whose update has the sign of the gradient move, by a larger step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lion_cases import DEVICE, FAST, IMPLEMENTATIONS, MOMENTA, floats, same_bits, same_state, tensor
from properties import examples
from reference import cautious_lion_float64

from megatron_lion.optim import kernel_launch
from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def train(params, optimizer, gradients):
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.decoupled_grad = grad.to(DEVICE)
        optimizer.step()
    return optimizer


def some_gradients(shapes, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_follows_the_float64_reference(implementation):
    gradients = some_gradients([(300,)], 30)
    param = torch.nn.Parameter(torch.linspace(-1, 1, 300, device=DEVICE))
    theta, exp_avg = param.detach().cpu().double().numpy(), np.zeros(300)
    train([param], Lion([param], cautious=True, implementation=implementation, **HYPER), gradients)
    moved = 0
    for (grad,) in gradients:
        before = theta
        theta, exp_avg = cautious_lion_float64(theta, exp_avg, grad.double().numpy(), **HYPER)
        moved += (np.abs(theta - before) > 2e-3).sum()
    assert 0.3 < moved / 9000 < 0.9  # some elements move, some do not
    # As for LION, θ rounds by 2^-24 a step and u by 2^-23 η φ. A count that is off by one shifts φη by 1e-4 in one step.
    assert np.abs(param.detach().cpu().numpy() - theta).max() < 30 * (2**-24 + 2**-23 * 1e-2 * 3) * 2


@examples(30)
@given(
    rows=st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_all_implementations_agree_bit_for_bit(rows, dtype):
    results = []
    for implementation in IMPLEMENTATIONS:
        param = torch.nn.Parameter(tensor([row[0] for row in rows], dtype))
        optimizer = Lion([param], cautious=True, implementation=implementation, **HYPER)
        optimizer.init_state()
        optimizer.state[param]["exp_avg"].copy_(tensor([row[2] for row in rows]))
        param.decoupled_grad = tensor([row[1] for row in rows])
        optimizer.step()
        results.append((param.detach(), optimizer.state[param]["exp_avg"]))
    for got in results[1:]:
        assert same_bits(got[0], results[0][0])
        assert same_bits(got[1], results[0][1])


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("master_weights", ["none", "split32"])
def test_every_mode_agrees(momentum, master_weights):
    shapes = [(40, 50), (33,), (0,), (1,)]
    gradients = some_gradients(shapes, 4)
    ends = []
    for implementation in IMPLEMENTATIONS:
        params = [torch.nn.Parameter(torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)) for shape in shapes]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
        settings = {"momentum": momentum, "master_weights": master_weights, "init_exp_avg": "first_gradient"}
        optimizer = Lion(groups, cautious=True, implementation=implementation, **settings, **HYPER)
        ends.append(train(params, optimizer, gradients))
    assert all(same_state(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shards_that_add_up_their_counts_are_the_whole(implementation):
    gradients = some_gradients([(100,)], 10)
    start = torch.linspace(-1, 1, 100)
    whole = torch.nn.Parameter(start.clone().to(DEVICE))
    train([whole], Lion([whole], cautious=True, implementation=implementation, **HYPER), gradients)

    def sum_agreement(params, agreement):
        assert [param.numel() for param in params] == agreement[:, 1].tolist()
        agreement.copy_(agreement.sum(0, keepdim=True).expand_as(agreement).clone())

    shards = [torch.nn.Parameter(part.clone().to(DEVICE)) for part in start.split([37, 60, 3])]
    optimizer = Lion(shards, cautious=True, sum_agreement=sum_agreement, implementation=implementation, **HYPER)
    train(shards, optimizer, [grads[0].split([37, 60, 3]) for grads in gradients])
    assert same_bits(torch.cat([shard.detach() for shard in shards]), whole.detach())


def test_agrees_with_lion_pytorch():
    theirs_module = pytest.importorskip(
        "lion_pytorch.cautious_lion", reason="needs lion_pytorch (the dev extra has it)"
    )
    gradients = some_gradients([(500,)], 40)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 500)) for _ in range(2))
    train([ours], Lion([ours], cautious=True, **HYPER), gradients)
    other = theirs_module.Lion([theirs], **HYPER)
    for (grad,) in gradients:
        theirs.grad = grad.clone()
        other.step()
    # Its φ comes from float32 sums; both round θ to 2^-24 a step. An element on the wrong side would show 1e-2.
    assert (ours - theirs).abs().max() < 40 * (4 * 2**-24 + 1e-2 * 2**-20)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_not_masked_away(implementation):
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    grad = torch.tensor([1.0, float("nan"), float("inf"), 0.0, -1.0])
    train([param], Lion([param], cautious=True, implementation=implementation), [[grad]])
    assert param.isnan().tolist() == [False, True, True, False, False]
    assert param[3] == 1.0


def test_when_nothing_agrees_nothing_moves_but_for_decay():
    for implementation in FAST:
        param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
        optimizer = Lion([param], cautious=True, implementation=implementation, **HYPER)
        optimizer.init_state()
        optimizer.state[param]["exp_avg"].fill_(-100.0)
        train([param], optimizer, [[torch.ones(5)]])
        assert torch.equal(param.detach(), torch.ones(5, device=DEVICE) - (torch.ones(5, device=DEVICE) * 0.1) * 1e-2)


def test_one_launch_more(monkeypatch):
    launches = []
    for name in ("launch", "count_agreement"):
        start = getattr(kernel_launch, name)
        monkeypatch.setattr(
            kernel_launch, name, lambda *arguments, start=start: launches.append(1) or start(*arguments)
        )
    params = [torch.nn.Parameter(torch.ones(size, device=DEVICE)) for size in (70, 3)]
    train(params, Lion(params, cautious=True, implementation="triton"), some_gradients([(70,), (3,)], 1))
    assert len(launches) == 2


def test_survives_copying_and_refuses_shards_without_a_sum(tmp_path):
    optimizer = Lion([torch.nn.Parameter(torch.ones(3))], cautious=True)
    assert copy.deepcopy(optimizer).cautious
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"cautious = True with DTensor parameters: needs sum_agreement"):
            Lion([param], cautious=True)
    finally:
        torch.distributed.destroy_process_group()
