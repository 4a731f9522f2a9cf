"""Dense parameters and gradients in any order of memory: the same bits as contiguous ones, in every implementation."""

from __future__ import annotations

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits
from reference import LionFloat32

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
MODES = (
    {"master_weights": "none", "momentum": "fp32"},
    {"master_weights": "split32", "momentum": "bf16", "cautious": True},
    {"master_weights": "fp32", "momentum": "fp32", "init_exp_avg": "first_gradient", "maximize": True},
)


def in_order(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Returns a copy whose dimension order[0] varies slowest in memory, and order[-1] fastest."""
    back = [order.index(dim) for dim in range(len(order))]
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def steps(implementation, mode, values, grads, param_order, grad_order):
    """Returns parameter and state after a step for each gradient; an order of None expands the gradient's first row."""
    dtype = torch.bfloat16 if mode["master_weights"] != "none" else torch.float32
    param = torch.nn.Parameter(in_order(values.to(DEVICE, dtype), param_order))
    optimizer = Lion([param], implementation=implementation, **HYPER, **mode)
    for grad in grads:
        grad = grad.to(DEVICE)
        param.decoupled_grad = in_order(grad, grad_order) if grad_order else grad[:1].expand(grad.shape)
        optimizer.step()
    assert param.stride() == in_order(values, param_order).stride()
    state = {name: optimizer.get_unscaled_state(param, name).contiguous() for name in optimizer.state[param]}
    return param.detach().contiguous(), state


CASES = [
    # shape, order of the parameter, order of the gradient (None: expanded)
    ((5, 3), (1, 0), (1, 0)),
    ((5, 3), (1, 0), (0, 1)),
    ((5, 3), (0, 1), (1, 0)),
    ((5, 3), (0, 1), None),
    ((2, 4, 6), (2, 0, 1), (2, 0, 1)),
    ((2, 4, 6), (1, 2, 0), (0, 2, 1)),
    ((4, 3, 5, 2), (0, 2, 3, 1), (0, 1, 2, 3)),  # channels_last with a contiguous gradient
    ((4, 1, 5, 2), (0, 2, 3, 1), (0, 1, 2, 3)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["master_weights"])
def test_any_dense_order_gives_the_bits_of_contiguous_tensors(implementation, mode):
    generator = torch.Generator().manual_seed(1)
    for shape, param_order, grad_order in CASES:
        values = torch.randn(shape, generator=generator)
        grads = [torch.randn(shape, generator=generator) for _ in range(3)]
        if grad_order is None:
            grads = [grad[:1].expand(shape).contiguous() for grad in grads]
        plain = tuple(range(len(shape)))
        expected, expected_state = steps("reference", mode, values, grads, plain, plain)
        got, state = steps(implementation, mode, values, grads, param_order, grad_order)
        assert same_bits(got, expected), (shape, param_order, grad_order)
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            assert same_bits(value, expected_state[name]), (name, shape, param_order, grad_order)
        if mode is MODES[0]:
            oracle = LionFloat32(values.numpy().copy(), **HYPER)
            for grad in grads:
                oracle.step(grad.numpy())
            assert same_bits(got.cpu(), torch.from_numpy(oracle.theta))
            assert same_bits(state["exp_avg"].cpu(), torch.from_numpy(oracle.exp_avg))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_int8_momentum_takes_a_gradient_in_any_order(implementation):
    mode = {"master_weights": "split32", "momentum": "int8"}
    values, grads = torch.randn(9, 5), [torch.randn(9, 5) for _ in range(2)]
    expected, _ = steps("reference", mode, values, grads, (0, 1), (0, 1))
    got, _ = steps(implementation, mode, values, grads, (0, 1), (1, 0))
    assert same_bits(got, expected)


@pytest.mark.parametrize("implementation", ["foreach", "triton"])
def test_an_order_that_changes_in_place_is_noticed(implementation):
    """The Triton path keeps addresses between steps; a transposed view has the same one."""
    ends = []
    for name in ("reference", implementation):
        param = torch.nn.Parameter(torch.arange(16.0, device=DEVICE).view(4, 4))
        optimizer = Lion([param], lr=0.1, weight_decay=0.1, implementation=name)
        for step in range(4):
            if step == 2:
                param.data = param.data.t()
            grad = torch.arange(-8.0, 8.0, device=DEVICE).view(4, 4)
            param.grad = grad.t() if step == 2 else grad
            optimizer.step()
        ends.append((param.detach().contiguous(), optimizer.state[param]["exp_avg"].contiguous()))
    assert same_bits(ends[0][0], ends[1][0])
    assert same_bits(ends[0][1], ends[1][1])
