"""No step writes outside its tensors: each of them is a view inside a larger buffer whose other bytes are known."""

from __future__ import annotations

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, MASTERS, MOMENTA, same_bits

from megatron_lion.optim import kernel_launch as launch
from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
PATTERN = 0xA5
# More than a program's elements in float32, so that a store without a mask ends inside the guard as well.
GUARD = 8 * max(shape.block for shape in launch.SHAPES.values())
# Around an int8 block's 32 elements and a program's 1,024 or 2,048; whole int8 blocks that do not fill a program.
LENGTHS = (1, 31, 32, 33, 64, 544, 992, 1023, 1024, 1025, 1056, 1536, 2016, 2047, 2048, 2049, 4096)
# The C++ loop hands out, and foreach blocks hold, 65,536 elements.
LONG = (65536 - 32, 65536 + 32, 65536 + 1)


class Guarded:
    """Copies tensors into guarded buffers and checks the guards."""

    def __init__(self, shift):
        self.shift = shift
        self.buffers = []

    def place(self, values):
        """Returns a copy of `values` that begins `shift` bytes after a multiple of 64."""
        begin, size = GUARD + self.shift, values.nbytes
        buffer = torch.full((begin + size + GUARD,), PATTERN, dtype=torch.uint8, device=values.device)
        self.buffers.append((buffer, begin, size))
        return buffer[begin : begin + size].view(values.dtype).view(values.shape).copy_(values)

    def damaged(self):
        """(number of the buffer, offset behind the tensor's first byte, the tensor's bytes) of every changed byte."""
        found = []
        for number, (buffer, begin, size) in enumerate(self.buffers):
            changed = buffer != PATTERN
            changed[begin : begin + size] = False
            found += [(number, int(offset) - begin, size) for offset in changed.nonzero().view(-1)]
        return found


def stepped(implementation, lengths, dtype, place, **settings):
    """An optimizer after two steps with every tensor where `place` puts it, and its (parameter, gradient) pairs."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for length in lengths:
        param = torch.nn.Parameter(place(torch.randn(length, generator=generator).to(DEVICE, dtype)))
        param.decoupled_grad = place(torch.randn(length, generator=generator).to(DEVICE))
        pairs.append((param, param.decoupled_grad.clone()))
    optimizer = Lion(
        [param for param, _ in pairs], lr=0.01, weight_decay=0.1, implementation=implementation, **settings
    )
    optimizer.init_state()
    for param, _ in pairs:
        state = optimizer.state[param]
        for name, value in state.items():
            if value.data_ptr() != param.data_ptr():  # a float32 parameter is its own master weight
                state[name] = place(value)
    optimizer.step()
    optimizer.step()
    return optimizer, pairs


def assert_guards_are_whole(implementation, lengths, dtype, shift=0, **settings):
    guarded = Guarded(shift)
    optimizer, pairs = stepped(implementation, lengths, dtype, guarded.place, **settings)
    expected, others = stepped("reference", lengths, dtype, torch.clone, **settings)
    assert guarded.damaged() == []
    for (param, grad), (other, _) in zip(pairs, others, strict=True):
        assert same_bits(param.decoupled_grad, grad)
        assert same_bits(param.detach(), other.detach())
        assert all(same_bits(optimizer.state[param][key], value) for key, value in expected.state[other].items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("master_weights", MASTERS)
def test_a_step_writes_nothing_outside_its_tensors(implementation, momentum, master_weights):
    settings = {"master_weights": master_weights, "momentum": momentum}
    assert_guards_are_whole(implementation, LENGTHS, torch.bfloat16, **settings)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_nor_at_addresses_that_are_not_multiples_of_16(implementation, dtype, cautious):
    settings = {"master_weights": "split32", "momentum": "int8", "cautious": cautious, "count_steps": True}
    assert_guards_are_whole(implementation, LENGTHS, dtype, shift=4, **settings)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.parametrize("mode", [("split32", "int8"), ("split24", "bf16"), ("fp32", "fp32")])
def test_nor_around_the_blocks_and_chunks_of_a_cpu(implementation, mode):
    settings = {"master_weights": mode[0], "momentum": mode[1]}
    assert_guards_are_whole(implementation, LONG, torch.bfloat16, **settings)


def test_the_count_of_agreeing_signs_is_written_to_its_own_elements():
    guarded = Guarded(0)
    params = [torch.nn.Parameter(torch.ones(length, device=DEVICE)) for length in LENGTHS]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Lion(params, cautious=True, implementation="triton")
    optimizer.step()
    counts = guarded.place(torch.zeros(len(LENGTHS), dtype=torch.int64, device=DEVICE))
    for kind, plan in optimizer._fleet.plans.items():
        launch.count_agreement(plan, kind, "fp32", False, None, counts)
    assert counts.tolist() == list(LENGTHS)
    assert guarded.damaged() == []
