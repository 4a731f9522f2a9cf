"""Lion as a torch optimizer: groups, rates, state, loading, rejected input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits, same_state, tensor

from megatron_lion.optim.lion import Lion

SHAPES = ((5, 7), (33,), (), (0,), (2, 3, 4))


def build(implementation="foreach", seed=0, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in SHAPES]
    groups = [
        {"params": params[:2], "weight_decay": 0.3, "name": "matrices"},
        {"params": params[2:], "lr": 0.02, "betas": (0.8, 0.9)},
    ]
    return Lion(groups, lr=0.01, betas=(0.9, 0.95), implementation=implementation, **settings), params


def train(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(DEVICE, param.dtype)
        optimizer.step()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_group_has_its_own_hyper_parameters(implementation):
    optimizer, params = build(implementation)
    train(optimizer, params, 3, seed=1)
    for index, (param, hyper) in enumerate(
        zip(params, [(0.01, 0.3, (0.9, 0.95))] * 2 + [(0.02, 0.0, (0.8, 0.9))] * 3, strict=True)
    ):
        start = build()[1][index]
        alone = Lion([start], lr=hyper[0], weight_decay=hyper[1], betas=hyper[2], implementation="reference")
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
            start.grad = grads[index].to(DEVICE)
            alone.step()
        assert same_bits(param.detach(), start.detach())
    assert optimizer.param_groups[0]["name"] == "matrices"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tensor_rate_equals_a_number_and_may_change_in_place(implementation):
    (by_number, params), (by_tensor, others) = build(implementation), build(implementation)
    for group in by_tensor.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=DEVICE)
    for seed, factor in enumerate((1.0, 0.5, 3.0)):
        for number, filled in zip(by_number.param_groups, by_tensor.param_groups, strict=True):
            number["lr"] = number["lr"] * factor
            filled["lr"].fill_(number["lr"])
        train(by_number, params, 2, seed)
        train(by_tensor, others, 2, seed)
    assert same_state(by_number, by_tensor)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_found_inf_leaves_every_bit_alone(implementation):
    optimizer, params = build(implementation, count_steps=True)
    train(optimizer, params, 2, seed=1)
    before = copy.deepcopy(optimizer)
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step(found_inf=torch.ones(1, device=DEVICE))
    assert same_state(optimizer, before)
    train(optimizer, params, 1, seed=2)
    assert [float(optimizer.state[param]["step"]) for param in params] == [3.0] * len(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step(found_inf=torch.zeros(1, device=DEVICE))
    assert float(optimizer.state[params[0]]["step"]) == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "saved", "deepcopy"])
def test_state_survives_uncast(dtype, how):
    optimizer, params = build(dtype=dtype, count_steps=True)
    train(optimizer, params, 4, seed=1)
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
        twins = [param for group in twin.param_groups for param in group["params"]]
        assert twin.implementation == "foreach"
    else:
        twin, twins = build(seed=9, dtype=dtype, count_steps=True)
        state = optimizer.state_dict()
        if how == "saved":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True, map_location="cpu")
        twin.load_state_dict(state)
        with torch.no_grad():
            for ours, other in zip(params, twins, strict=True):
                other.copy_(ours)
    assert all(twin.state[param]["exp_avg"].dtype == torch.float32 for param in twins)
    assert same_state(optimizer, twin)
    train(optimizer, params, 4, seed=2)
    train(twin, twins, 4, seed=2)
    assert same_state(optimizer, twin)
    assert optimizer.state[params[0]]["step"].item() == 8


def test_one_step_tensor_shared_by_all_states_is_not_counted_many_times():
    """When megatron-core loads, it gives every state the same 0-d `step` tensor."""
    optimizer, params = build(count_steps=True)
    optimizer.init_state()
    state = optimizer.state_dict()
    shared = torch.tensor(7.0)
    for entry in state["state"].values():
        entry["step"] = shared
    optimizer.load_state_dict(state)
    train(optimizer, params, 1, seed=1)
    assert [optimizer.state[param]["step"].item() for param in params] == [8.0] * len(params)


def test_hooks_see_the_whole_state_when_it_is_loaded():
    optimizer, params = build()
    train(optimizer, params, 1, seed=1)
    other, _ = build()
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(len(loaded["state"])))
    other.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    other.load_state_dict(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert seen == [len(SHAPES)] * 4


def test_state_of_another_model_is_refused():
    optimizer, params = build()
    train(optimizer, params, 1, seed=1)
    other = Lion([torch.nn.Parameter(torch.zeros(3)) for _ in SHAPES[:2]])
    other.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2)) for _ in SHAPES[2:]]})
    with pytest.raises(ValueError, match=r"shape \(5, 7\).*shape \(3,\).*load the state of the same model"):
        other.load_state_dict(optimizer.state_dict())


def test_groups_assigned_from_outside_take_over():
    """DistributedOptimizer replaces the groups by its own, with flat shards and extra keys."""
    model = torch.nn.Linear(6, 4)
    optimizer = Lion([{"params": list(model.parameters()), "wd_mult": 1.0, "is_expert_parallel": False}])
    shards = [torch.nn.Parameter(torch.ones(17)), torch.nn.Parameter(torch.empty(0))]
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": shards}]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["wd_mult"] == 1.0
    optimizer.init_state()
    for shard in shards:
        shard.grad = torch.ones_like(shard)
    optimizer.step()
    assert torch.equal(shards[0].detach(), torch.full((17,), 1 - 1e-4))
    assert {tuple(optimizer.state[shard]["exp_avg"].shape) for shard in shards} == {(17,), (0,)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_channels_last_weights_are_updated_in_place(implementation):
    plain = torch.nn.Parameter(torch.randn(4, 3, 5, 5, device=DEVICE))
    nhwc = torch.nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    grad = torch.randn_like(plain)
    plain.grad, nhwc.grad = grad, grad.to(memory_format=torch.channels_last)
    for param in (plain, nhwc):
        Lion([param], weight_decay=0.1, implementation=implementation).step()
    assert torch.equal(plain, nhwc)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", ["fp32", "bf16"])
def test_a_model_may_go_to_channels_last_between_two_steps(implementation, momentum):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 16, 3, 3, generator=generator)
    gradients = [torch.randn(8, 16, 3, 3, generator=generator) for _ in range(4)]
    ends = []
    for turn in (len(gradients), 2):
        param = torch.nn.Parameter(start.clone().to(DEVICE))
        optimizer = Lion([param], lr=0.01, implementation=implementation, momentum=momentum)
        for number, gradient in enumerate(gradients):
            form = torch.channels_last if number >= turn else torch.contiguous_format
            param.data = param.data.to(memory_format=form)
            param.grad = gradient.to(DEVICE).to(memory_format=form)
            optimizer.step()
        ends.append((param.detach(), optimizer.get_unscaled_state(param, "exp_avg")))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_int8_blocks_refuse_channels_last():
    param = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="channels_last"):
        Lion([param], betas=(0.9, 0.95), momentum="int8").step()


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_inside_a_compiled_function_the_state_lives_on(implementation):
    start, gradients = torch.randn(6), [torch.randn(6) for _ in range(4)]
    ends = []
    for compiled in (False, True):
        param = torch.nn.Parameter(start.clone())
        optimizer = Lion([param], lr=0.1, betas=(0.9, 0.95), implementation=implementation)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for gradient in gradients:
            param.grad = gradient.clone()
            step()
        ends.append((param.detach(), optimizer.state[param]["exp_avg"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_loading_refuses_what_building_refuses():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    packed = Lion([weight], betas=(0.9, 0.99), momentum="int8")
    with pytest.raises(ValueError, match="second at most"):
        packed.load_state_dict(Lion([weight], betas=(0.9, 0.9999)).state_dict())
    assert packed.param_groups[0]["betas"] == (0.9, 0.99)
    weight.grad = torch.ones_like(weight)
    adamw = torch.optim.AdamW([weight])
    adamw.step()
    with pytest.raises(ValueError, match="exp_avg_sq"):
        Lion([weight]).load_state_dict(adamw.state_dict())
    other = torch.nn.Parameter(torch.ones(8, 2))
    other.grad = torch.ones_like(other)
    trained = Lion([other])
    trained.step()
    with pytest.raises(ValueError, match=r"\(8, 2\) for a parameter of shape \(4, 4\)"):
        Lion([weight]).load_state_dict(trained.state_dict())


def test_dtensor_parameters_are_updated_in_their_local_shard(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.nn.Parameter(torch.randn(6, 5))
        sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        plain.grad = torch.randn(6, 5)
        sharded.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
        one, other = Lion([plain], weight_decay=0.1), Lion([sharded], weight_decay=0.1)
        one.step()
        other.step()
        assert isinstance(other.state[sharded]["exp_avg"], DTensor)
        assert torch.equal(sharded.full_tensor(), plain)
    finally:
        torch.distributed.destroy_process_group()


def test_closure_and_missing_gradients():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Lion([used, unused], lr=0.5)
    assert optimizer.step() is None

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert used.tolist() == [0.5] * 3
    assert unused.tolist() == [1.0] * 3
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-4}, r"lr = -0.0001: needs a finite number, 0 or above"),
        ({"lr": float("nan")}, r"lr = nan"),
        ({"lr": torch.tensor([1.0, 2.0])}, r"lr is a tensor of 2 elements.*needs one element, torch.float32"),
        ({"lr": torch.tensor(1.0, dtype=torch.float64)}, r"torch.float64: needs one element, torch.float32"),
        ({"betas": (1.0, 0.99)}, r"betas = \(1.0, 0.99\): needs two numbers, each at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, r"betas"),
        ({"betas": (0.9,)}, r"needs two numbers"),
        ({"weight_decay": -0.1}, r"weight_decay = -0.1: needs a finite number, 0 or above"),
        ({"weight_decay": float("inf")}, r"weight_decay = inf"),
        ({"init_exp_avg": "ones"}, r"init_exp_avg = 'ones': needs one of zeros, first_gradient"),
        ({"implementation": "cuda"}, r"'cuda': needs one of auto, reference, foreach, cpp, triton"),
        ({"master_weights": "fp16"}, r"needs one of none, fp32, split32, split24"),
        ({"momentum": "fp8"}, r"needs one of fp32, bf16, int8"),
        ({"momentum": "int8", "betas": (0.9, 0.999)}, r"needs the second at most 0.996"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Lion([torch.nn.Parameter(torch.zeros(2))], **settings)


def test_a_refused_group_is_not_added():
    optimizer = Lion([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="lr = -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_that_cannot_be_updated_are_refused(implementation):
    with pytest.raises(ValueError, match=r"complex64.*needs a dense"):
        Lion([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = torch.nn.Embedding(4, 3, sparse=True).to(DEVICE)
    embedding(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(ValueError, match="turn off `sparse=True`"):
        Lion(embedding.parameters(), implementation=implementation).step()
    for param in (torch.zeros(6, 4)[:, ::2], torch.zeros(1).expand(6), torch.zeros(7).as_strided((2, 4), (3, 1))):
        weight = torch.nn.Parameter(param)
        weight.decoupled_grad = torch.zeros(param.shape)
        with pytest.raises(ValueError, match=r"strides \(.*without gap or overlap"):
            Lion([weight], implementation=implementation).step()
    weight = torch.nn.Parameter(tensor([1.0, 2.0]))
    weight.decoupled_grad = tensor([1.0])
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        Lion([weight], implementation=implementation).step()
