"""The algorithm: every implementation against the equations, and the known properties of LION."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lion_cases import (
    DEVICE,
    FAST,
    IMPLEMENTATIONS,
    betas,
    decays,
    finite_floats,
    floats,
    lrs,
    same_bits,
    same_state,
    tensor,
)  # fmt: skip
from properties import examples
from reference import LionFloat32, lion_float64

from megatron_lion.optim.lion import Lion, from_adamw

# Triton's interpreter computes with numpy, which warns about overflow and NaN; a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
QUICK = examples(40)


def one_step(param, grad, exp_avg, implementation="reference", **hyper):
    """Returns a parameter and its momentum after one step from the given ones."""
    param = torch.nn.Parameter(param.clone())
    optimizer = Lion([param], implementation=implementation, **hyper)
    optimizer.init_state()
    optimizer.state[param]["exp_avg"].copy_(exp_avg)
    param.decoupled_grad = grad
    optimizer.step()
    return param.detach(), optimizer.state[param]["exp_avg"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_thousand_steps_equal_the_float32_reference_and_follow_the_float64_one(implementation):
    rng = np.random.default_rng(1)
    start = rng.standard_normal(97).astype(np.float32)
    hyper = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}
    param = torch.nn.Parameter(torch.from_numpy(start.copy()).to(DEVICE))
    optimizer = Lion([param], implementation=implementation, **hyper)
    reference = LionFloat32(start.copy(), **hyper)
    theta, exp_avg = start.astype(np.float64), np.zeros(97)
    for _ in range(1000 if implementation != "triton" else 200):  # interpreted, a launch takes 10 ms
        grad = rng.standard_normal(97).astype(np.float32)
        param.grad = torch.from_numpy(grad).to(DEVICE)
        optimizer.step()
        reference.step(grad)
        theta, exp_avg = lion_float64(theta, exp_avg, grad.astype(np.float64), **hyper)
    assert same_bits(param.detach().cpu(), torch.from_numpy(reference.theta))
    assert same_bits(optimizer.state[param]["exp_avg"].cpu(), torch.from_numpy(reference.exp_avg))
    # A step rounds θ once, by at most 2^-24 |θ|, and η u by at most 2^-23 η. One wrong sign would add 2η = 6e-3.
    bound = 1000 * (2**-24 * np.abs(start).max() + 2**-23 * 3e-3)
    assert np.abs(param.detach().cpu().numpy() - theta).max() < bound


@QUICK
@given(
    rows=st.lists(st.tuples(floats, floats, floats), max_size=70),
    hyper=st.fixed_dictionaries({"lr": lrs, "betas": betas, "weight_decay": decays}),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_all_implementations_agree_bit_for_bit_on_any_values(rows, hyper, dtype, grad_dtype):
    param, grad, exp_avg = (tensor([row[i] for row in rows]) for i in range(3))
    param, grad = param.to(dtype), grad.to(grad_dtype)
    expected = one_step(param, grad, exp_avg, **hyper)
    for implementation in FAST:
        got = one_step(param, grad, exp_avg, implementation, **hyper)
        assert same_bits(got[0], expected[0]), implementation
        assert same_bits(got[1], expected[1]), implementation


@QUICK
@given(
    rows=st.lists(st.tuples(finite_floats, finite_floats, finite_floats), min_size=1, max_size=40),
    hyper=st.fixed_dictionaries({"lr": lrs, "betas": betas, "weight_decay": decays}),
)
def test_a_step_commutes_with_the_sign(rows, hyper):
    param, grad, exp_avg = (tensor([row[i] for row in rows]) for i in range(3))
    for implementation in IMPLEMENTATIONS:
        there = one_step(param, grad, exp_avg, implementation, **hyper)
        back = one_step(-param, -grad, -exp_avg, implementation, **hyper)
        assert torch.equal(-back[0], there[0])
        assert torch.equal(-back[1], there[1])


@QUICK
@given(
    st.lists(st.tuples(finite_floats, st.floats(2**-10, 1e3, width=32)), min_size=1, max_size=40), st.integers(-40, 40)
)
def test_the_first_step_ignores_the_scale_of_the_gradient(rows, exponent):
    param, grad = tensor([row[0] for row in rows]), tensor([row[1] * (-1) ** i for i, row in enumerate(rows)])
    for implementation in IMPLEMENTATIONS:
        plain, _ = one_step(param, grad, torch.zeros_like(param), implementation, lr=0.01)
        scaled, _ = one_step(param, grad * 2.0**exponent, torch.zeros_like(param), implementation, lr=0.01)
        assert same_bits(plain, scaled)
        assert torch.equal(plain, param - 0.01 * grad.sign())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_gradient_and_momentum_nothing_moves_but_for_decay(implementation):
    param = tensor([1.5, -2.0, 0.0, -0.0, 1e-40])
    zero = torch.zeros_like(param)
    still, exp_avg = one_step(param, zero, zero, implementation, lr=0.1)
    assert same_bits(still, param)
    assert not exp_avg.any()
    decayed, _ = one_step(param, -zero, zero, implementation, lr=0.1, weight_decay=0.5)
    assert torch.equal(decayed, param - (param * 0.5) * 0.1)


@QUICK
@given(
    st.lists(st.lists(finite_floats, min_size=3, max_size=3), min_size=1, max_size=20),
    st.sampled_from([0.05, 0.5, 1.0]),
    st.sampled_from([0.01, 0.3, 1.0]),
)
def test_the_box_is_never_left(grads, weight_decay, lr):
    param = torch.nn.Parameter(tensor([1 / weight_decay, -1 / weight_decay, 0.0]))
    optimizer = Lion([param], lr=lr, weight_decay=weight_decay, implementation="foreach")
    for grad in grads:
        param.grad = tensor(grad)
        optimizer.step()
        # (1 - ηλ)|θ| + η ≤ 1/λ exactly; λθ, u, ηu and the difference each round by at most 2^-24.
        assert param.abs().max() <= (1 + 2**-22) / weight_decay


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_never_a_step(implementation, value):
    grad = torch.ones(5, device=DEVICE)
    grad[2] = value
    param, _ = one_step(torch.ones(5, device=DEVICE), grad, torch.zeros(5, device=DEVICE), implementation)
    assert param.isnan().tolist() == [False, False, True, False, False]


def other_lion(package, params, **hyper):
    """Returns another package's Lion; skips the test if the package is not installed."""
    module = pytest.importorskip(package, reason=f"needs {package.split('.')[0]} (the dev extra has it)")
    return module.Lion(params, **hyper)


@pytest.mark.parametrize("package", ["lion_pytorch", "emerging_optimizers.scalar_optimizers"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_agrees_with_others(package, weight_decay):
    """The others compute θ(1 - ηλ) - ηs, ours θ - η(s + λθ): equal but for rounding."""
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(shape, generator=generator) for shape in ((25, 12), (200,))]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    hyper = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    optimizer, other = Lion(ours, **hyper), other_lion(package, theirs, **hyper)
    for _ in range(100):
        for mine, yours in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            mine.grad[..., -1] = 0.0  # sign(0) = 0: an element that never had a gradient only decays
            yours.grad = mine.grad.clone()
        optimizer.step()
        other.step()
    for mine, yours, start in zip(ours, theirs, starts, strict=True):
        # Each rounds θ at most twice a step, by 2^-24 |θ|; a sign that differs would add 2e-3.
        assert (mine - yours).abs().max() < 100 * 4 * 2**-24 * start.abs().max()
        exp_avg, theirs_avg = optimizer.state[mine]["exp_avg"], other.state[yours]["exp_avg"]
        # c rounds three times a step, and the rounding errors decay with β2: at most 100 steps of 2^-24.
        assert (exp_avg - theirs_avg).abs().max() < 100 * 2**-24 * exp_avg.abs().max()


@pytest.mark.parametrize(("peak", "common_error"), [(1e-5, -0.15), (1e-6, 1.0)])
def test_the_decay_keeps_its_strength_where_the_common_form_rounds_it(peak, common_error):
    """Cosine from η = 1e-5 at λ = 0.01: the figures in docs/optimizer.md for θ - η(s + λθ) and θ(1 - ηλ) - ηs."""
    generator = torch.Generator().manual_seed(1)
    start = (torch.rand(2000, generator=generator) + 1) * 0.25
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    hyper = {"betas": (0.9, 0.99), "weight_decay": 0.01}
    optimizers = [Lion([ours], lr=peak, **hyper), other_lion("lion_pytorch", [theirs], lr=peak, **hyper)]
    exact, undecayed, exp_avg = start.double().numpy(), start.double().numpy(), np.zeros(2000)
    for step in range(2000):
        lr = peak * (1 + np.cos(np.pi * step / 2000)) / 2
        grad = torch.randn(2000, generator=generator)
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad
            optimizer.param_groups[0]["lr"] = float(lr)
            optimizer.step()
        undecayed, _ = lion_float64(undecayed, exp_avg, grad.double().numpy(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
        exact, exp_avg = lion_float64(exact, exp_avg, grad.double().numpy(), lr=lr, **hyper)
    decay = (undecayed - exact).mean()
    our_error = (ours.detach().double().numpy() - exact).mean() / decay
    their_error = (theirs.detach().double().numpy() - exact).mean() / decay
    # θ itself rounds to 2^-24 |θ| a step, up or down alike; at η = 1e-6 the decay is a tenth of that.
    assert abs(our_error) < (0.01 if peak == 1e-5 else 0.4)
    assert abs(their_error) > 0.9 * abs(common_error)
    assert their_error * common_error > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_betas_are_signum(implementation):
    generator = torch.Generator().manual_seed(4)
    param = torch.nn.Parameter(torch.zeros(50, device=DEVICE))
    optimizer = Lion([param], lr=0.5, betas=(0.8, 0.8), implementation=implementation)
    momentum, expected = torch.zeros(50), torch.zeros(50)
    for _ in range(20):
        grad = torch.randn(50, generator=generator)
        momentum = momentum * 0.8 + grad * (1 - 0.8)
        expected -= 0.5 * momentum.sign()
        param.grad = grad.to(DEVICE)
        optimizer.step()
    assert torch.equal(param.detach().cpu(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_parameters_are_updated_in_float64(implementation):
    if implementation == "triton":
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"float64.*use implementation = 'foreach'"):
            Lion([param], implementation="triton").step()
        return
    rng = np.random.default_rng(5)
    theta, exp_avg, grad = rng.standard_normal((3, 40))
    hyper = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    got, momentum = one_step(*(torch.from_numpy(x) for x in (theta, grad, exp_avg)), implementation, **hyper)
    expected = lion_float64(theta, exp_avg, grad, **hyper)
    assert got.dtype == momentum.dtype == torch.float64
    assert np.abs(got.numpy() - expected[0]).max() < 1e-15
    assert np.abs(momentum.numpy() - expected[1]).max() < 1e-15


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_gradient_becomes_the_momentum_even_late_or_after_a_skipped_step(implementation):
    early, late = (torch.nn.Parameter(torch.zeros(4, device=DEVICE)) for _ in range(2))
    optimizer = Lion([early, late], lr=1.0, implementation=implementation, init_exp_avg="first_gradient")
    optimizer.init_state()
    gradient = tensor([1.0, -2.0, 3.0, 0.0])
    early.grad = gradient.clone()
    optimizer.step(found_inf=torch.ones((), device=DEVICE))
    assert not early.any()
    optimizer.step()
    late.grad = early.grad = gradient.clone() * 5
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in (early, late)]
    resumed = Lion(resumed_params, implementation=implementation, init_exp_avg="first_gradient")
    resumed.load_state_dict(optimizer.state_dict())
    for param, other in zip((early, late), resumed_params, strict=True):
        other.grad = param.grad
    optimizer.step()
    resumed.step()
    expected = gradient * torch.tensor(0.99) + gradient * torch.tensor(1 - 0.99)
    expected = expected * torch.tensor(0.99) + gradient * 5 * torch.tensor(1 - 0.99)
    assert torch.equal(optimizer.state[early]["exp_avg"], expected)
    begun = gradient * 5 * torch.tensor(0.99) + gradient * 5 * torch.tensor(1 - 0.99)
    assert torch.equal(optimizer.state[late]["exp_avg"], begun)
    assert same_state(optimizer, resumed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_multiplier_scales_the_gradient_as_it_is_read(implementation):
    param, grad, exp_avg = tensor([1.0, 2.0]), tensor([0.3, -0.7]), tensor([0.1, 0.2])
    expected = one_step(param, grad * 0.37, exp_avg, implementation)
    weight = torch.nn.Parameter(param.clone())
    optimizer = Lion([weight], implementation=implementation)
    optimizer.init_state()
    optimizer.state[weight]["exp_avg"].copy_(exp_avg)
    weight.grad = grad.clone()
    optimizer.step(grad_multiplier=tensor(0.37))
    assert same_bits(weight.detach(), expected[0])
    assert same_bits(optimizer.state[weight]["exp_avg"], expected[1])
    assert same_bits(weight.grad, grad)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_multipliers_round_one_after_the_other(implementation, cautious):
    """The reference multiplied by hand; the product of both factors, rounded first, would give other bits."""
    first, second = tensor(1 / 3), tensor(0.7)
    grads = [torch.sin(torch.arange(80.0, device=DEVICE) * (step + 1)) for step in range(3)]
    assert not same_bits(grads[0] * first * second, grads[0] * (first * second))
    ends = []
    for name in ("reference", implementation):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 80, device=DEVICE))
        optimizer = Lion([weight], lr=0.1, cautious=cautious, implementation=name)
        for grad in grads:
            if not ends:
                weight.grad = grad * first * second
                optimizer.step()
            else:
                weight.grad = grad.clone()
                optimizer.step(grad_multiplier=torch.stack([first, second]))
        ends.append((weight.detach(), optimizer.state[weight]["exp_avg"]))
    assert same_bits(ends[0][0], ends[1][0])
    assert same_bits(ends[0][1], ends[1][1])


def test_a_multiplier_has_one_or_two_elements():
    optimizer = Lion([torch.nn.Parameter(torch.ones(3))])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"grad_multiplier of {count} elements: needs one or two"):
            optimizer.step(grad_multiplier=torch.ones(count))


def test_from_adamw_keeps_the_product_of_rate_and_decay():
    for ratio in (3, 7, 10):
        pair = from_adamw(6e-4, 0.1, ratio)
        assert pair.lr * pair.weight_decay == pytest.approx(6e-5, rel=1e-12)
        assert pair.lr == pytest.approx(6e-4 / ratio)
    with pytest.raises(ValueError, match=r"ratio = 0.*between 3 and 10"):
        from_adamw(1e-3, 0.1, 0)
    for lr, decay, name in ((-1e-3, 0.1, "lr"), ("1e-3", 0.1, "lr"), (1e-3, float("nan"), "weight_decay")):
        with pytest.raises(ValueError, match=f"^{name} = .*: needs a finite number, 0 or above"):
            from_adamw(lr, decay)
