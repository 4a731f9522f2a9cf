"""Compares kernel and reference bit for bit: forms of the state, odd addresses, special values, skipped steps."""

from __future__ import annotations

import itertools
import os
import struct
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from megatron_lion.optim.lion import MASTER_CHOICES, MOMENTUM_CHOICES, Lion

# Lengths around the 1,024 or, with int8 momentum, 2,048 elements of a kernel program and the 32 of an int8 block; an empty tensor.
LENGTHS = (1023, 1024, 0, 1025, 2047, 2048, 2049, 1, 31, 33)
# ±0, the smallest and a medium subnormal, the smallest normal, bfloat16 ties of both parities, the largest number,
# infinities, NaN.
AWKWARD = tuple(
    struct.unpack("<f", struct.pack("<I", bits))[0]
    for bits in (0, 1 << 31, 1, 0x00412345, 0x00800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
                 0x7FC00000)
)  # fmt: skip


class Form(NamedTuple):
    """One combination of settings for which the kernel is compiled."""

    master_weights: str
    momentum: str
    cautious: bool
    grad_dtype: torch.dtype
    offset: int

    def __str__(self) -> str:
        caution = "cautious " if self.cautious else ""
        return f"{caution}{self.master_weights}/{self.momentum}, {self.grad_dtype} gradients, offset {self.offset}"


FORMS = [
    Form(*choice)
    for choice in itertools.product(
        MASTER_CHOICES, MOMENTUM_CHOICES, (False, True), (torch.float32, torch.bfloat16), (0, 3)
    )
]


def differences(device: str, forms: list[Form], processes: int) -> list[str]:
    """Returns the forms that differ from the reference, and where. It uses several processes, since compiling one form takes 0.3 s."""
    shares = [forms[number::processes] for number in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [line for found in pool.map(_differences_of, shares, itertools.repeat(device)) for line in found]


def _differences_of(forms: list[Form], device: str) -> list[str]:
    return [f"{form}: {where}" for form in forms if (where := difference(form, device)) is not None]


def difference(form: Form, device: str) -> str | None:
    """Returns the first tensor in which three steps on `device` differ from the reference on the CPU, or None.

    The first and third step are taken. The second has found_inf set and must change nothing. Gradients are scaled by
    a multiplier. Offset 0 starts the momentum at zero, offset 3 at the first gradient.
    """
    reference, ours = (_steps(form, *place) for place in (("reference", "cpu"), ("triton", device)))
    for name, expected in reference.items():
        if not same_bits(expected, ours[name]):
            return name
    return None


def _steps(form: Form, implementation: str, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = form.offset + sum(LENGTHS) + 5
    buffer = torch.randn(total, generator=generator).to(torch.bfloat16).to(device)
    gradients = [torch.randn(total, generator=generator) for _ in range(3)]
    values = torch.tensor(AWKWARD)
    if os.environ.get("TRITON_INTERPRET") == "1" and form.grad_dtype == torch.bfloat16:
        values[3] = 0.0  # Triton's interpreter reads a bfloat16 subnormal as another number; a compiled kernel does not
    for gradient in gradients:
        gradient[form.offset + 40 : form.offset + 40 + len(AWKWARD)] = values
    grad_buffer = torch.zeros(total, dtype=form.grad_dtype, device=device)
    params, first = [], form.offset
    for length in LENGTHS:
        param = torch.nn.Parameter(buffer[first : first + length])
        param.decoupled_grad = grad_buffer[first : first + length]
        params.append(param)
        first += length
    optimizer = Lion(
        [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.1}], lr=2.0**-9, betas=(0.9, 0.95),
        implementation=implementation, master_weights=form.master_weights, momentum=form.momentum, cautious=form.cautious,
        init_exp_avg="first_gradient" if form.offset else "zeros",
    )  # fmt: skip
    multiplier = torch.tensor(0.7, device=device)
    for gradient, found in zip(gradients, (0.0, 1.0, 0.0), strict=True):
        grad_buffer.copy_(gradient)
        optimizer.step(grad_multiplier=multiplier, found_inf=torch.tensor(found, device=device))
    # The whole buffers are compared: elements before, between and after the tensors must keep their bits.
    found_tensors = {"parameters": buffer, "gradients": grad_buffer}
    for number, param in enumerate(params):
        found_tensors |= {f"{name} of tensor {number}": value for name, value in optimizer.state[param].items()}
    return {name: tensor.detach().cpu() for name, tensor in found_tensors.items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit; all NaNs count as equal, since processors give them different bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    whole = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return bool(((left.isnan() & right.isnan()) | (left.view(whole) == right.view(whole))).all())
