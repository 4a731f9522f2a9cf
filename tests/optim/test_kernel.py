"""The Triton kernel: addresses, masks, tables, launches. Interpreted on a CPU, compiled on CUDA."""

from __future__ import annotations

import pytest
import torch
from lion_cases import AWKWARD, DEVICE, MASTERS, MOMENTA, after_steps_on_views, same_bits, same_state, tensor

from megatron_lion.optim import kernel_launch
from megatron_lion.optim.layouts import PackedLayout
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.precision import int8_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("first", [0, 1, 3, 64])
@pytest.mark.parametrize("mode", [("split32", "fp32"), ("split24", "int8"), ("fp32", "bf16")])
def test_views_at_any_offset_are_updated_and_their_neighbours_left_alone(first, mode):
    """Shards as a rank has them: lengths close to a program's, odd offsets, an empty one."""
    block = kernel_launch.SHAPES[mode[1]].block
    lengths = (block - 1, block, 0, block + 1, 1, 31, 33)
    options = {"master_weights": mode[0], "momentum": mode[1]}
    expected, found = (
        after_steps_on_views(name, lengths, first, DEVICE, **options) for name in ("reference", "triton")
    )
    assert same_state(expected, found)


@pytest.mark.parametrize("begin", ["zeros", "first_gradient"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master_weights", MASTERS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_whole_chunks_of_awkward_values_are_updated_as_by_the_reference(momentum, master_weights, grad_dtype, begin):
    """Aligned tensors of several programs, without a masked element, and one that ends within a program's second part."""
    block = kernel_launch.SHAPES[momentum].block
    ends = []
    for implementation in ("reference", "triton"):
        generator = torch.Generator().manual_seed(2)
        params = []
        for length in (2 * block, 2 * block - 70):
            param = torch.nn.Parameter(torch.randn(length, generator=generator).to(DEVICE, torch.bfloat16))
            assert param.data_ptr() % 16 == 0
            params.append(param)
        optimizer = Lion(
            params, lr=0.01, weight_decay=0.1, implementation=implementation, master_weights=master_weights,
            momentum=momentum, init_exp_avg=begin, betas=(0.9, 0.95),
        )  # fmt: skip
        for number in range(3):
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                grad *= 2.0 ** torch.randint(-140, 60, grad.shape, generator=generator)
                if number > 0:  # blocks with a scale lose it
                    grad[7::64] = tensor(AWKWARD).cpu().repeat(200)[: len(grad[7::64])]
                grad[: block // 4] = torch.randn(block // 4, generator=generator)
                param.decoupled_grad = grad.to(DEVICE, grad_dtype)
            optimizer.step(grad_multiplier=torch.tensor([0.37, 0.9], device=DEVICE))
        ends.append(optimizer)
    assert same_state(*ends)


@pytest.mark.parametrize("master_weights", MASTERS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_elements_beyond_two_to_the_31(master_weights, momentum):
    """Addresses are moved back by more than 2^31 elements, and the chunk numbers forward by as many.

    A packed int8 momentum has its scales after all elements. That case reserves 2 GiB of address space, of which only
    the pages that are written use memory.
    """
    block = kernel_launch.SHAPES[momentum].block
    first = (2**31 + 16) // block + 3
    beyond, length = first * block, block + 77
    generator = torch.Generator().manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(length, generator=generator).to(DEVICE, torch.bfloat16))
    plain.decoupled_grad = torch.randn(length, generator=generator).to(DEVICE)
    expected = Lion([plain], master_weights=master_weights, momentum=momentum, implementation="reference")
    expected.step()
    param = plain.detach().clone()
    state = {key: value.detach().clone() for key, value in expected.state[plain].items()}
    expected.step()

    tail = state["exp_avg"]
    if momentum == "int8":
        state["exp_avg"], tail = far_away(tail, beyond, length)
    slot = kernel_launch.Slot(param, plain.decoupled_grad, state, expected.param_groups[0])
    kind, row = kernel_launch._describe(slot, PackedLayout(master_weights, momentum), 0, 0)
    sizes = [2, 4, 0 if momentum == "int8" else tail.element_size()]
    sizes.append(state["master_param"].element_size() if "master_param" in state else 0)
    addresses = [address - beyond * size for address, size in zip(row[:4], sizes, strict=True)]
    rows = ((*addresses, beyond + length, 0, 0),)
    plan = kernel_launch.update_plan(None, rows, expected.param_groups, DEVICE, momentum)
    plan.chunks_table = torch.tensor([[0, first], [0, first + 1]], dtype=torch.int32, device=DEVICE)
    kernel_launch.launch(plan, kind, momentum, False, None, None)

    assert same_bits(param, plain.detach())
    if momentum == "int8":
        state["exp_avg"] = torch.cat([part.view(torch.uint8) for part in tail])
    for key, value in expected.state[plain].items():
        assert same_bits(state[key], value.detach()), key


def far_away(packed, beyond, length):
    """Returns a packed momentum of `beyond + length` elements that ends with `packed`, and views of that end's two parts."""
    blocks = -(-length // 32)
    whole = torch.empty(int8_bytes(beyond + length), dtype=torch.uint8, device=packed.device)
    elements, scales = whole[beyond : beyond + 32 * blocks], whole[-2 * blocks :]
    elements.copy_(packed[: 32 * blocks])
    scales.copy_(packed[32 * blocks :])
    return whole, (elements, scales)


def tiny(implementation="triton", **settings):
    params = [torch.nn.Parameter(torch.ones(size, device=DEVICE)) for size in (70, 3, 5)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    return Lion(groups, implementation=implementation, **settings), params


def test_all_groups_and_tensors_go_in_one_launch(monkeypatch):
    launches = []
    start = kernel_launch.launch
    monkeypatch.setattr(kernel_launch, "launch", lambda *arguments: launches.append(1) or start(*arguments))
    optimizer, params = tiny()
    optimizer.step()
    assert len(launches) == 1
    params[1].data = params[1].data.to(torch.bfloat16)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert len(launches) == 3


def test_tables_are_sent_again_only_when_something_changed(monkeypatch):
    uploads = []
    pinned = kernel_launch._pinned
    monkeypatch.setattr(kernel_launch, "_pinned", lambda *arguments: uploads.append(1) or pinned(*arguments))
    optimizer, params = tiny()
    optimizer.step()
    first = len(uploads)
    optimizer.step()
    assert len(uploads) == first
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert len(uploads) == first + 1
    assert params[0][0].item() == pytest.approx((1 - 1.1e-4) - 1e-4 * 1.1 - 0.5 * 1.1, abs=1e-3)
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert len(uploads) > first + 1


def test_a_rate_in_device_memory_is_read_at_each_step():
    lr = torch.tensor(0.5, device=DEVICE)
    optimizer, params = tiny(lr=lr)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert params[1].tolist() == [0.25] * 3


def test_gradients_that_move_are_found_again():
    optimizer, params = tiny(lr=0.5)
    for sign in (1.0, -1.0, -1.0, 1.0):
        for param in params:
            param.grad = torch.full_like(param, sign * 10)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    expected, reference = tiny("reference", lr=0.5)
    for sign in (1.0, -1.0, -1.0, 1.0):
        for param in reference:
            param.grad = torch.full_like(param, sign * 10)
        expected.step()
    assert same_state(optimizer, expected)


def test_what_changes_between_steps_is_noticed():
    """A gradient is removed and set again, a group is added, a state is loaded or replaced."""
    ends = []
    for implementation in ("reference", "triton"):
        optimizer, params = tiny(implementation, lr=0.125, count_steps=True)
        optimizer.step()
        first = params[1].grad
        params[1].grad = None
        optimizer.step()
        params[1].grad = first
        optimizer.step()
        more = torch.nn.Parameter(torch.ones(9, device=DEVICE))
        more.grad = torch.ones_like(more)
        optimizer.add_param_group({"params": [more], "lr": 0.25})
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[2]["weight_decay"] = 0.5
        optimizer.step()
        optimizer.state[more]["exp_avg"] = torch.full_like(more, -100.0)
        optimizer.step()
        assert more[0] > 0.25  # the step read the replaced momentum
        more.data = torch.zeros(9, device=DEVICE)
        optimizer.step()
        assert more[0] == 0.25
        ends.append(optimizer)
    assert same_state(*ends)
    assert [ends[1].state[param]["step"].item() for param in ends[1].param_groups[1]["params"]] == [6.0, 7.0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_the_step_waits_for_nothing_and_runs_in_a_graph():
    optimizer, params = tiny(lr=torch.tensor(0.5, device=DEVICE), count_steps=True)
    multiplier, found = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(grad_multiplier=multiplier, found_inf=found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = params[1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(grad_multiplier=multiplier, found_inf=found)
    assert torch.equal(params[1], before)
    graph.replay()
    assert torch.equal(params[1], before - 0.5)
    found.fill_(1)
    graph.replay()
    assert torch.equal(params[1], before - 0.5)
