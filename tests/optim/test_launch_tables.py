"""The choice of kernel variant and addresses: alignment, programs, and the signature of a step's tensors."""

from __future__ import annotations

import pytest
import torch
from lion_cases import DEVICE, MASTERS, MOMENTA, same_bits

from megatron_lion.optim import foreach
from megatron_lion.optim import kernel_launch as launch
from megatron_lion.optim.cautious import count_agreement, with_caution
from megatron_lion.optim.layouts import PackedLayout
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.update import PlainLayout, Slot, reference_step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
GROUP = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def shifted(values, by):
    """Returns a copy that begins `by` bytes after a multiple of 64."""
    buffer = torch.zeros(by + values.nbytes, dtype=torch.uint8, device=values.device)
    return buffer[by:].view(values.dtype).copy_(values)


@pytest.mark.parametrize("by", [0, 4, 8, 12, 16, 48])
@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "master_param"])
def test_one_address_that_is_no_multiple_of_16_makes_a_tensor_unaligned(which, by):
    """The compiled kernel may move 16 bytes at once where all are; interpreted it would not show."""
    tensors = {
        "param": torch.ones(64, dtype=torch.bfloat16, device=DEVICE),
        "grad": torch.ones(64, device=DEVICE),
        "exp_avg": torch.ones(64, device=DEVICE),
        "master_param": torch.ones(64, dtype=torch.int16, device=DEVICE),
    }
    tensors[which] = shifted(tensors[which], by)
    state = {"exp_avg": tensors["exp_avg"], "master_param": tensors["master_param"]}
    kind, row = launch._describe(
        Slot(tensors["param"], tensors["grad"], state, {}), PackedLayout("split32", "fp32"), 0, 0
    )
    assert row[:4] == tuple(tensor.data_ptr() for tensor in tensors.values())
    assert kind[-1] == (by % 16 == 0)


def test_every_program_has_elements_and_every_element_a_program():
    block = launch.PLAIN.block
    chunks = launch.chunk_table([1, 0, block - 1, block, block + 1, 0, 3 * block], block)
    assert chunks.tolist() == [[0, 0], [2, 0], [3, 0], [4, 0], [4, 1], [6, 0], [6, 1], [6, 2]]
    assert launch.chunk_table([0, 0], block).shape == (0, 2)


@pytest.mark.parametrize("changed", ["gradient", "parameter"])
def test_a_dtype_that_changes_at_an_unchanged_address_is_noticed(changed):
    """An allocator may put a converted tensor where an earlier one was."""
    ends = []
    for implementation in ("reference", "triton"):
        grad_buffer = torch.zeros(256, dtype=torch.uint8, device=DEVICE)
        values = torch.linspace(-1, 2, 64, device=DEVICE)
        param = torch.nn.Parameter(values.bfloat16())
        param.decoupled_grad = grad_buffer.view(torch.float32).copy_(values)
        optimizer = Lion([param], lr=0.01, implementation=implementation)
        optimizer.step()
        if changed == "gradient":
            param.decoupled_grad = grad_buffer[:128].view(torch.bfloat16).copy_(-values * 100)
        else:
            address = param.data_ptr()
            param.data = param.data.view(torch.float16)
            param.data.copy_(values)
            assert param.data_ptr() == address
        optimizer.step()
        ends.append((param.detach(), optimizer.state[param]["exp_avg"]))
    assert same_bits(ends[0][0], ends[1][0])
    assert same_bits(ends[0][1], ends[1][1])


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("master_weights", MASTERS)
@pytest.mark.parametrize("cautious", [False, True])
def test_foreach_operations_of_other_devices_are_the_reference(master_weights, momentum, cautious):
    """`foreach_step` takes them on a device only; here they run where the tests are."""
    layout = PlainLayout() if (master_weights, momentum) == ("none", "fp32") else PackedLayout(master_weights, momentum)
    multiplier = torch.tensor([0.37, 0.9], device=DEVICE)
    ends = []
    for take_step in (reference_step, foreach._foreach_group):
        generator = torch.Generator().manual_seed(1)
        slots = []
        for size in (70, 1, 33):
            param = torch.randn(size, generator=generator).to(DEVICE, torch.bfloat16)
            slots.append(Slot(param, torch.empty(0), layout.new_state(param, float("nan")), GROUP))
        for number in range(3):
            slots = [
                slot._replace(grad=torch.randn(slot.param.shape, generator=generator).to(DEVICE)) for slot in slots
            ]
            slots[0].grad[3 * number : 3 * number + 3] = torch.tensor([0.0, -0.0, float("nan")])
            given = slots
            if cautious:
                given = with_caution(slots, count_agreement(slots, layout, True, multiplier), None)
            take_step(given, layout, True, multiplier)
        ends.append([tensor for slot in slots for tensor in (slot.param, *slot.state.values())])
    assert all(same_bits(one, other) for one, other in zip(*ends, strict=True))


def test_tables_are_kept_while_every_tensor_stays_where_it_is():
    """Rebuilding them costs the host about ten times what checking the addresses does."""
    params = [torch.nn.Parameter(torch.ones(40, device=DEVICE)) for _ in range(3)]
    optimizer = Lion(params, implementation="triton")
    grads = [torch.ones(40, device=DEVICE) for _ in params]
    fleets = []
    for step in range(4):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if step == 3:
            params[1].grad = grads[1].clone()
        optimizer.step()
        fleets.append(optimizer._fleet)
    assert fleets[0] is fleets[1] is fleets[2]
    assert fleets[3] is not fleets[2]
