"""Launches of the kernels for a layer's element-wise work; they never wait for the device.

Shapes: N rows (tokens), H columns. Tensors are contiguous unless it is stated otherwise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import JITFunction

from megatron_lion.model.elementwise_kernels import (
    bias_dropout_add_kernel,
    bias_gelu_backward_kernel,
    bias_gelu_kernel,
    column_sums_kernel,
    dropout_backward_kernel,
    join_qkv_kernel,
)
from megatron_lion.model.layer_norm_kernels import layer_norm_backward_kernel, layer_norm_kernel

NUM_WARPS = 4
# A program of 128 threads has 8 rows of 256 columns at a time: two accesses of 16 bytes a thread in 16-bit formats.
STEP, COLUMNS = 8, 256
# Partial sums are written and read in float32. At 64 rows a program they are 1/16 of a 16-bit gradient's traffic, at 32
# rows 1/8; few tokens need the smaller part, or there are fewer programs than an H200 has multiprocessors.
ROWS_OF_NORM = 4
MANY_TOKENS, ROWS_OF_MANY, ROWS_OF_FEW = 2**13, 64, 32


@dataclass(frozen=True)
class Dropout:
    """One draw of a dropout mask.

    Attributes:
        seed: of Philox, int64 [1] on the device; None drops nothing.
        threshold: an element is dropped with the probability threshold / 65,536.
    """

    seed: torch.Tensor | None
    threshold: int

    @classmethod
    def draw(cls, probability: float, device: torch.device) -> Dropout:
        """Draws a seed from the device's default generator, so that recomputation and resuming give the same mask."""
        threshold = round(probability * 2**16)
        return cls(torch.randint(2**62, (1,), device=device) if threshold else None, threshold)

    def options(self, like: torch.Tensor) -> dict[str, Any]:
        """Returns the kernels' arguments; `like` stands for the seed that is not read."""
        scale = 2**16 / (2**16 - self.threshold)
        is_on = self.seed is not None
        return {"seed": self.seed if is_on else like, "threshold": self.threshold, "scale": scale, "DROPOUT": is_on}


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the normed rows, their means and 1 / sqrt(variance + eps), both float32 [N]."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty_like(x)
    means, inverses = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    with _on(x):
        layer_norm_kernel[(triton.cdiv(rows, ROWS_OF_NORM),)](
            *map(_as_bits, (x, weight, bias, y)), means, inverses, rows, width, eps, ROWS=ROWS_OF_NORM,
            BLOCK=triton.next_power_of_2(width), num_warps=NUM_WARPS,
        )  # fmt: skip
    return y, means, inverses


def layer_norm_backward(
    dy: torch.Tensor,
    residual_gradient: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    means_N: torch.Tensor,
    inverses_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of x, with `residual_gradient` added, of the weight and of the bias (see `_column_sums`)."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    dx = torch.empty_like(x)
    per_program = _rows_of_program(rows)
    partials = torch.empty(2, triton.cdiv(rows, per_program), width, dtype=torch.float32, device=x.device)
    with _on(x):
        layer_norm_backward_kernel[(partials.shape[1],)](
            _as_bits(dy), _as_bits(dy if residual_gradient is None else residual_gradient), _as_bits(x), _as_bits(weight),
            means_N, inverses_N, _as_bits(dx), partials, rows, width, HAS_RESIDUAL=residual_gradient is not None,
            ROWS=per_program, BLOCK=triton.next_power_of_2(width), num_warps=NUM_WARPS,
        )  # fmt: skip
    d_weight, d_bias = _column_sums(partials, weight, bias)
    return dx, d_weight, d_bias


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, erf: bool) -> torch.Tensor:
    """Returns GELU(x + bias), in the exact form if `erf`, else in the tanh form."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty_like(x)
    with _on(x):
        bias_gelu_kernel[(triton.cdiv(rows, STEP), triton.cdiv(width, COLUMNS))](
            *map(_as_bits, (x, bias, y)), rows, width, ERF=erf, STEP=STEP, COLUMNS=COLUMNS, num_warps=NUM_WARPS
        )
    return y


def bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, *, erf: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and of the bias."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    dx = torch.empty_like(x)
    per_program = _rows_of_program(rows)
    partials = torch.empty(1, triton.cdiv(rows, per_program), width, dtype=torch.float32, device=x.device)
    with _on(x):
        bias_gelu_backward_kernel[(partials.shape[1], triton.cdiv(width, COLUMNS))](
            *map(_as_bits, (dy, x, bias, dx)), partials, rows, width,
            ERF=erf, ROWS=per_program, STEP=STEP, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, _column_sums(partials, bias)[0]


def bias_dropout_add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Returns residual + dropout(x + bias)."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    with _on(x):
        bias_dropout_add_kernel[(triton.cdiv(rows, STEP), triton.cdiv(width, COLUMNS))](
            *map(_as_bits, (x, bias, residual)), out=_as_bits(out), rows=rows, width=width, **dropout.options(bias),
            STEP=STEP, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def bias_dropout_add_backward(
    dy: torch.Tensor, bias: torch.Tensor, dropout: Dropout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x, which is `dy` itself if nothing is dropped, and of the bias."""
    width, rows = dy.shape[-1], dy.numel() // dy.shape[-1]
    dx = dy if dropout.seed is None else torch.empty_like(dy)
    per_program = _rows_of_program(rows)
    partials = torch.empty(1, triton.cdiv(rows, per_program), width, dtype=torch.float32, device=dy.device)
    with _on(dy):
        dropout_backward_kernel[(partials.shape[1], triton.cdiv(width, COLUMNS))](
            _as_bits(dy), dx=_as_bits(dx), partials=partials, rows=rows, width=width, **dropout.options(bias),
            ROWS=per_program, STEP=STEP, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, _column_sums(partials, bias)[0]


def join_qkv(gradients_SBND: tuple[torch.Tensor, ...], bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the three gradients side by side, contiguous [S, B, N, 3 D], and the bias's gradient [3 N D].

    Args:
        gradients_SBND: of query, key and value, with any strides along S, B and N.
        bias: of the layer that made them, for its dtype.
    """
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in gradients_SBND]
    sequence, batch, heads, channels = parts[0].shape
    rows = sequence * batch
    joined = torch.empty(sequence, batch, heads, 3 * channels, dtype=parts[0].dtype, device=parts[0].device)
    per_program = _rows_of_program(rows)
    partials = torch.empty(1, triton.cdiv(rows, per_program), bias.numel(), dtype=torch.float32, device=joined.device)
    columns = triton.next_power_of_2(channels)
    step = min(per_program, max(1, STEP * COLUMNS // columns))
    strides = [stride for part in parts for stride in part.stride()[:3]]
    with _on(joined):
        join_qkv_kernel[(partials.shape[1], 3 * heads)](
            *map(_as_bits, (*parts, joined)), partials, rows, batch, *strides, channels,
            ROWS=per_program, STEP=step, COLUMNS=columns, num_warps=NUM_WARPS,
        )  # fmt: skip
    return joined, _column_sums(partials, bias)[0]


def _column_sums(partials_KPH: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Sums over P for each of K parameters [H]; returns what a backward pass returns as their gradients.

    If megatron-core's DDP holds a gradient buffer for the parameters, the sums are added there, without a rounding to the
    parameters' dtype before. Such a parameter is marked, and DDP's hook then ignores the gradient that is returned, which is
    memory without values: the contract that megatron-core's linear layer with fused accumulation and Transformer Engine use.
    """
    kinds, count, width = partials_KPH.shape
    has_buffers = all(hasattr(parameter, "grad_added_to_main_grad") for parameter in parameters)
    returned = [torch.empty_like(parameter) for parameter in parameters]
    targets = [parameter.main_grad for parameter in parameters] if has_buffers else returned  # type: ignore[attr-defined]
    step, columns = 32, 32
    with _on(partials_KPH):
        column_sums_kernel[(triton.cdiv(width, columns), kinds)](
            partials_KPH, _as_bits(targets[0]), _as_bits(targets[-1]), count, width, ADD=has_buffers, STEP=step,
            COLUMNS=columns, num_warps=NUM_WARPS,
        )  # fmt: skip
    if has_buffers:
        for parameter in parameters:
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return returned


def _rows_of_program(rows: int) -> int:
    return ROWS_OF_MANY if rows >= MANY_TOKENS else ROWS_OF_FEW


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as the kernels take it: bfloat16 as int16 in Triton's interpreter."""
    is_interpreted = not isinstance(layer_norm_kernel, JITFunction)
    return tensor.detach().view(torch.int16) if is_interpreted and tensor.dtype == torch.bfloat16 else tensor.detach()


def _on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
