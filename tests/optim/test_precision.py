"""State in fewer bits: exact modes are tested bit for bit, the others within bounds that are derived in comments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lion_cases import (
    AWKWARD,
    DEVICE,
    FAST,
    IMPLEMENTATIONS,
    MASTERS,
    MOMENTA,
    floats,
    parameters,
    same_bits,
    same_state,
    tensor,
)
from properties import examples
from reference import LionFloat32, round_to_bfloat16

from megatron_lion.optim import foreach
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.precision import int8_bytes, join_master, pack_int8, split_master, unpack_int8

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
QUICK = examples(60)
MODES = list(itertools.product(MASTERS, MOMENTA))


def every_low_half(high: int) -> torch.Tensor:
    """Returns the 65,536 float32 values whose upper 16 bits are `high`."""
    bits = np.arange(65536, dtype=np.uint32) | np.uint32(high << 16)
    return torch.from_numpy(bits.view(np.float32))


@pytest.mark.parametrize("high", [0x0000, 0x8000, 0x007F, 0x0080, 0x3F80, 0x3F81, 0xBFFF, 0x7F7F, 0xFF7F, 0x7F80])
def test_split32_can_be_undone_for_every_remainder(high):
    values = every_low_half(high)
    hi, lo = split_master(values, "split32")
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int16)
    assert same_bits(join_master(hi, lo), values)
    finite = values.isfinite()
    expected = round_to_bfloat16(values.numpy(), halves_up=True)
    assert same_bits(hi.to(torch.float32)[finite], torch.from_numpy(expected)[finite])
    assert hi.isnan().equal(values.isnan())


@pytest.mark.parametrize("high", [0x0000, 0x8000, 0x0080, 0x3F80, 0x3FFF, 0xBFFF])
def test_split24_keeps_24_bits_rounded(high):
    values = every_low_half(high)
    back = join_master(*split_master(values, "split24"))
    # Half a unit of the 24 bits kept: 2^-16 of the binade's base, or of the smallest normal number below it.
    assert ((back - values).abs() <= 2**-16 * values.abs().clamp(min=2**-126)).all()
    assert same_bits(join_master(*split_master(back, "split24")), back)


@QUICK
@given(st.lists(floats, min_size=1, max_size=100))
def test_int8_is_near_and_stays_the_same_when_packed_again(values):
    original = tensor(values)
    packed = pack_int8(original)
    assert packed.numel() == int8_bytes(len(values))
    back = unpack_int8(packed, len(values))
    assert same_bits(pack_int8(back), packed)
    for block, kept in zip(original.split(32), back.split(32), strict=True):
        if not block.isfinite().all():
            assert kept.isnan().all()
            continue
        # Half a step of s ≈ max|m|/127, s itself rounded to 8 bits; a block that needs s < 2^-126 becomes zero.
        assert (kept - block).abs().max() <= block.abs().max() * (0.502 / 127) + 127 * 2.0**-126


@pytest.mark.parametrize(
    ("implementation", "grad_dtype"),
    [
        # Triton's interpreter takes 20 s for a thousand steps.
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (name == "triton" and dtype == torch.float32))
        for name in IMPLEMENTATIONS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_split32_is_the_float32_master_for_a_thousand_steps(implementation, grad_dtype):
    rng = np.random.default_rng(7)
    start = rng.standard_normal(61).astype(np.float32)
    start = round_to_bfloat16(start, halves_up=False)
    hyper = {"lr": 2.0**-11, "betas": (0.9, 0.99), "weight_decay": 0.1}  # many exact ties
    param = torch.nn.Parameter(torch.from_numpy(start).to(DEVICE, torch.bfloat16))
    optimizer = Lion([param], implementation=implementation, master_weights="split32", **hyper)
    reference = LionFloat32(start.copy(), **hyper)
    # Interpreted, a launch takes 10 ms, so only one case runs all steps.
    for _ in range(1000 if implementation != "triton" or grad_dtype == torch.float32 else 50):
        grad = torch.from_numpy(rng.standard_normal(61).astype(np.float32)).to(grad_dtype)
        param.decoupled_grad = grad.to(DEVICE)
        optimizer.step()
        reference.step(grad.float().numpy())
    master = optimizer.get_unscaled_state(param, "master_param").cpu()
    assert same_bits(master, torch.from_numpy(reference.theta))
    assert same_bits(optimizer.state[param]["exp_avg"].cpu(), torch.from_numpy(reference.exp_avg))
    expected = round_to_bfloat16(reference.theta, halves_up=True)
    assert same_bits(param.detach().float().cpu(), torch.from_numpy(expected))


def test_fp32_master_writes_the_nearest_even_copy():
    rng = np.random.default_rng(8)
    param = torch.nn.Parameter(torch.ones(200, dtype=torch.bfloat16, device=DEVICE))
    optimizer = Lion([param], lr=2.0**-9, master_weights="fp32")
    for _ in range(30):
        param.grad = torch.from_numpy(rng.standard_normal(200)).to(param)
        optimizer.step()
    master = optimizer.state[param]["master_param"]
    assert master.dtype == torch.float32
    assert same_bits(param.detach(), master.to(torch.bfloat16))
    assert not torch.equal(param.float(), master)


class Quadratic:
    """Minimises ½ Σ (θ - θ*)² by noisy gradients, with two groups, in one precision mode."""

    def __init__(self, master_weights, momentum, implementation="foreach", dtype=torch.bfloat16, **settings):
        generator = torch.Generator().manual_seed(11)
        shapes = ((40, 5), (65,), (3,), (0,))
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in shapes]
        self.targets = [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]
        self.noise = torch.Generator().manual_seed(12)
        groups = [{"params": self.params[:1], "weight_decay": 0.1}, {"params": self.params[1:]}]
        hyper = {"lr": 2e-3, "betas": (0.9, 0.95)}
        self.optimizer = Lion(
            groups, implementation=implementation, master_weights=master_weights, momentum=momentum, **hyper, **settings
        )

    def run(self, steps):
        for _ in range(steps):
            for param, target in zip(self.params, self.targets, strict=True):
                noise = torch.randn(param.shape, generator=self.noise).to(DEVICE)
                param.decoupled_grad = param.detach().float() - target + 0.3 * noise
            self.optimizer.step()
        return self

    def loss(self):
        masters = [self.optimizer.get_unscaled_state(p, "master_param") for p in self.params]
        return sum(float(((m - t) ** 2).sum()) for m, t in zip(masters, self.targets, strict=True)) / 2


@pytest.mark.parametrize(("master_weights", "momentum"), MODES)
def test_every_mode_is_the_same_in_every_implementation(master_weights, momentum):
    for dtype in (torch.bfloat16, torch.float32):
        reference = Quadratic(master_weights, momentum, "reference", dtype, init_exp_avg="first_gradient").run(5)
        for implementation in FAST:
            other = Quadratic(master_weights, momentum, implementation, dtype, init_exp_avg="first_gradient").run(5)
            assert same_state(reference.optimizer, other.optimizer), (implementation, dtype)


@pytest.mark.parametrize(("master_weights", "momentum"), MODES)
@pytest.mark.parametrize("form", ["packed", "unscaled"])
def test_every_mode_resumes_bit_for_bit(master_weights, momentum, form):
    whole = Quadratic(master_weights, momentum, count_steps=True).run(6)
    state = whole.optimizer.state_dict() if form == "packed" else whole.optimizer.unscaled_state_dict()
    if form == "unscaled":
        tensors = [value for entry in state["state"].values() for value in entry.values()]
        assert {value.dtype for value in tensors} == {torch.float32}
    resumed = Quadratic(master_weights, momentum, count_steps=True)
    resumed.noise.set_state(whole.noise.get_state())
    with torch.no_grad():
        for param, other in zip(whole.params, resumed.params, strict=True):
            other.copy_(param)
    resumed.optimizer.load_state_dict(state)
    assert same_state(whole.optimizer, resumed.optimizer)
    whole.run(4)
    resumed.run(4)
    assert same_state(whole.optimizer, resumed.optimizer)


@pytest.mark.parametrize("form", ["packed", "unscaled"])
@pytest.mark.parametrize("source", MODES)
def test_checkpoints_cross_all_modes(source, form):
    saved = Quadratic(*source).run(6)
    state = saved.optimizer.state_dict() if form == "packed" else saved.optimizer.unscaled_state_dict()
    has_master = source[0] != "none"
    for (master_weights, momentum), dtype in itertools.product(MODES, (torch.bfloat16, torch.float32)):
        target = Quadratic(master_weights, momentum, dtype=dtype)
        with torch.no_grad():
            for param, other in zip(saved.params, target.params, strict=True):
                other.copy_(param)  # a model's own checkpoint holds the bfloat16 weights
        target.optimizer.load_state_dict(state)
        for param, other in zip(saved.params, target.params, strict=True):
            if other.numel() == 0:
                continue
            ours = saved.optimizer.get_unscaled_state(param, "exp_avg")
            theirs = target.optimizer.get_unscaled_state(other, "exp_avg")
            # bfloat16 keeps 8 bits; int8 half a step of max/127 and its scale's rounding.
            relative = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.502 / 127}[momentum]
            assert (ours - theirs).abs().max() <= relative * ours.abs().max()
            if has_master and (dtype == torch.float32 or master_weights in ("fp32", "split32")):
                master = saved.optimizer.get_unscaled_state(param, "master_param")
                kept = other.detach()
                if dtype != torch.float32:
                    kept = target.optimizer.get_unscaled_state(other, "master_param")
                assert same_bits(kept, master)
            elif not has_master:
                assert same_bits(other.detach().to(param.dtype), param.detach())
                if master_weights != "none":
                    kept = target.optimizer.get_unscaled_state(other, "master_param")
                    assert same_bits(kept.to(torch.bfloat16), param.detach())
        target.run(1)


@pytest.mark.parametrize(
    ("mode", "bound"),
    [
        # Exact masters: split32 and fp32 differ only in the 16-bit copy at ties, and no value here is a tie.
        (("split32", "fp32"), 1e-12),
        # A rounded momentum flips signs where |c| is near 0. Near the optimum the loss is the noise floor of ±η steps.
        (("split32", "bf16"), 0.02),
        (("split32", "int8"), 0.05),
        (("split24", "fp32"), 0.02),
        (("split24", "int8"), 0.05),
    ],
)
def test_reduced_modes_reach_the_loss_of_the_float32_master(mode, bound):
    exact = Quadratic("fp32", "fp32").run(500).loss()
    start = Quadratic("fp32", "fp32")
    start.optimizer.init_state()
    reduced = Quadratic(*mode).run(500).loss()
    assert abs(reduced - exact) <= bound * (start.loss() - exact)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_momentum_without_gradient_dies_away(momentum):
    """A momentum that never decays would move the embedding rows that no batch touches for ever."""
    param = torch.nn.Parameter(torch.zeros(64, device=DEVICE))
    optimizer = Lion([param], betas=(0.9, 0.99), momentum=momentum)
    param.grad = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    optimizer.step()
    first = optimizer.get_unscaled_state(param, "exp_avg").abs().max()
    param.grad = torch.zeros_like(param)
    for _ in range(1000):
        optimizer.step()
    # 0.99^1000 = 4e-5; rounding the factor 0.99 to 8 bits leaves it below 0.9944.
    assert optimizer.get_unscaled_state(param, "exp_avg").abs().max() < 0.9944**1000 * first


def test_nothing_is_packed_into_nothing():
    assert pack_int8(torch.zeros(0)).numel() == int8_bytes(0) == 0
    assert unpack_int8(pack_int8(torch.zeros(0)), 0).shape == (0,)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_kept_visible(momentum, value):
    for master_weights in MASTERS:
        param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=DEVICE))
        optimizer = Lion([param], master_weights=master_weights, momentum=momentum, implementation="foreach")
        grad = torch.ones(64, device=DEVICE)
        grad[40] = value
        param.decoupled_grad = grad
        optimizer.step()
        assert param.isnan().nonzero().view(-1).tolist() == [40]
        param.decoupled_grad = torch.ones(64, device=DEVICE)
        optimizer.step()
        expected = list(range(32, 64)) if momentum == "int8" else [40]
        assert param.isnan().nonzero().view(-1).tolist() == expected


def test_bytes_of_state_are_what_the_documentation_says():
    numel = 32 * 1000
    expected = {
        ("none", "fp32"): 4, ("none", "bf16"): 2, ("none", "int8"): 1.0625, ("fp32", "fp32"): 8, ("split32", "fp32"): 6,
        ("split32", "bf16"): 4, ("split32", "int8"): 3.0625, ("split24", "int8"): 2.0625,
    }  # fmt: skip
    for (master_weights, momentum), bytes_per_parameter in expected.items():
        param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
        optimizer = Lion([param], master_weights=master_weights, momentum=momentum)
        optimizer.init_state()
        assert sum(value.nbytes for value in optimizer.state[param].values()) == numel * bytes_per_parameter


def test_the_contract_of_a_precision_aware_distributed_optimizer():
    """megatron-core's rules for an inner optimizer that owns the master weights."""
    flat = torch.randn(100).to(DEVICE, torch.bfloat16)
    shard = torch.nn.Parameter(flat[13:77])  # a view into a bucket of parameters
    whole = torch.nn.Parameter(torch.randn(9, device=DEVICE))
    optimizer = Lion([shard, whole], master_weights="split32", count_steps=True, lr=torch.tensor(1e-3, device=DEVICE))
    optimizer.init_state()
    assert optimizer.state[shard].keys() == optimizer.state[whole].keys() == {"exp_avg", "master_param", "step"}
    assert optimizer.state[whole]["master_param"].data_ptr() == whole.data_ptr()
    value = torch.randn(64, device=DEVICE)
    optimizer.set_scaled_state(shard, "master_param", value)
    assert same_bits(optimizer.get_unscaled_state(shard, "master_param"), value)
    assert same_bits(flat[13:77], split_master(value, "split32")[0])
    optimizer.set_scaled_state(shard, "exp_avg", value)
    assert same_bits(optimizer.get_unscaled_state(shard, "exp_avg"), value)
    gradient = torch.randn(64, device=DEVICE)
    shard.decoupled_grad = gradient.clone()
    before = flat.clone()
    optimizer.step()
    assert same_bits(shard.decoupled_grad, gradient)
    assert torch.equal(flat[:13], before[:13])
    assert torch.equal(flat[77:], before[77:])
    assert {entry["step"].item() for entry in (optimizer.state[shard],)} == {1.0}


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        (
            {"master_weights": "split32"},
            torch.float16,
            r"'split32'.*torch.float16: needs one of torch.float32, torch.bf",
        ),
        ({"master_weights": "fp32"}, torch.float64, r"float64"),
        ({"momentum": "bf16", "betas": (0.9, 0.999)}, torch.float32, r"'bf16' with betas.*momentum = 'fp32'"),
    ],
)
def test_modes_that_cannot_work_are_refused(settings, dtype, message):
    with pytest.raises(ValueError, match=message):
        Lion([torch.nn.Parameter(torch.zeros(3, dtype=dtype))], **settings)


def test_packed_momentum_of_another_size_is_refused():
    optimizer = Lion([torch.nn.Parameter(torch.zeros(40))], momentum="int8")
    optimizer.init_state()
    with pytest.raises(ValueError, match=r"34 elements, torch.uint8.*\(40,\)"):
        optimizer.set_scaled_state(parameters(optimizer)[0], "exp_avg", pack_int8(torch.zeros(32)))


def test_awkward_masters_survive_a_step_that_changes_nothing():
    values = torch.tensor(AWKWARD)
    values = values[values.isfinite()].to(DEVICE)
    for implementation in IMPLEMENTATIONS:
        param = torch.nn.Parameter(torch.zeros(len(values), dtype=torch.bfloat16, device=DEVICE))
        optimizer = Lion([param], lr=0.0, master_weights="split32", implementation=implementation)
        optimizer.set_scaled_state(param, "master_param", values)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert same_bits(optimizer.get_unscaled_state(param, "master_param"), values), implementation


@pytest.mark.parametrize("mode", [("none", "fp32"), ("split32", "bf16"), ("fp32", "int8")])
def test_blocks_of_the_cpu_path_meet_without_a_seam(mode, monkeypatch):
    monkeypatch.setattr(foreach, "CPU_BLOCK", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for shape in ((64, 5), (2, 3, 5, 5)):
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(shape, generator=generator).to(torch.bfloat16)
        gradient = torch.randn(shape, generator=generator)
        if len(shape) == 4 and mode[1] != "int8":
            start, gradient = (x.to(memory_format=torch.channels_last) for x in (start, gradient))
        ends = []
        for implementation in ("reference", "foreach"):
            param = torch.nn.Parameter(start.clone())
            param.decoupled_grad = gradient
            settings = {"master_weights": mode[0], "momentum": mode[1], "weight_decay": 0.1, "lr": 0.01}
            ends.append(Lion([param], implementation=implementation, count_steps=True, **settings))
            for _ in range(3):
                ends[-1].step()
        assert same_state(*ends)
