"""Weight gradients of megatron-core's linear layers, added to the gradient buffer by the matrix product itself.

Without this, a linear layer's backward pass makes a weight gradient in the model's dtype, and DDP's hook adds it to the
fp32 buffer afterwards. With `train.gradient_accumulation_fusion` the product dW = dY^T X is computed with the buffer as
its third operand: no 16-bit gradient is written and read again, and it is not rounded to 16 bits on its way.

megatron-core asks an extension of Apex for that product. torch has the same one, so a run needs no Apex: see `install`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

from megatron_lion.device import Device
from megatron_lion.errors import EnvironmentFault

logger = logging.getLogger(__name__)


def add_weight_gradient(total_input_NI: torch.Tensor, grad_output_NO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """Adds grad_output^T total_input to `main_grad` in place, rounded once to its dtype.

    On CUDA cuBLAS multiplies 16-bit operands, sums in fp32 and adds to the fp32 buffer, without a temporary tensor. On a
    CPU torch has no such product: it multiplies fp32 copies of the operands, which is slower and the same to fp32's
    rounding.

    Args:
        total_input_NI: the layer's input.
        grad_output_NO: gradient of the layer's output, the input's dtype.
        main_grad_OI: the weight's place in the gradient buffer, fp32 or the input's dtype.
    """
    if total_input_NI.dtype == main_grad_OI.dtype:
        main_grad_OI.addmm_(grad_output_NO.t(), total_input_NI)
    elif main_grad_OI.is_cuda:
        torch.addmm(main_grad_OI, grad_output_NO.t(), total_input_NI, out_dtype=main_grad_OI.dtype, out=main_grad_OI)
    else:
        main_grad_OI.addmm_(grad_output_NO.t().to(main_grad_OI.dtype), total_input_NI.to(main_grad_OI.dtype))


class TorchProducts:
    """What megatron-core calls of Apex's module fused_weight_gradient_mlp_cuda, under the same names."""

    wgrad_gemm_accum_fp32 = staticmethod(add_weight_gradient)
    wgrad_gemm_accum_fp16 = staticmethod(add_weight_gradient)


def has_apex() -> bool:
    """Returns whether megatron-core found Apex's extension, which is then left in its place."""
    found = getattr(layers, "fused_weight_gradient_mlp_cuda", None)
    return found is not None and found is not TorchProducts


def install() -> None:
    """Gives megatron-core torch's product in the place of Apex's extension, unless Apex is installed."""
    if has_apex():
        return
    # mcore 0.19.2: layers.py imports Apex's extension as a global name, and refuses gradient_accumulation_fusion if the
    # flag beside it is not set; remove when megatron-core has a product of its own. utils.py imports the extension a
    # second time, for defer_embedding_wgrad_compute, which no run sets.
    layers.fused_weight_gradient_mlp_cuda = TorchProducts
    layers._grad_accum_fusion_available = True


@functools.cache
def why_no_fusion(device: Device) -> str | None:
    """Returns the reason the device cannot add a 16-bit product to an fp32 matrix, in one line, or None if it can.

    The first call multiplies two small matrices and waits for the result: whether torch has the operation, and whether
    it takes an fp32 addend, depends on its version, its build and its environment.
    """
    if has_apex():
        return None
    try:
        for dtype in (torch.bfloat16, torch.float16):
            ones = torch.ones(16, 16, dtype=dtype, device=device.torch_device)
            total = torch.ones(16, 16, device=device.torch_device)
            add_weight_gradient(ones, ones, total)
            if not bool((total == 17).all()):
                return f"torch {torch.__version__} computed 1 + 16 = {float(total.mean()):g} in {dtype}"
    except Exception as error:  # any of them would otherwise end the first backward pass
        reason = str(error).strip().split("\n")[0]
        return f"torch {torch.__version__}: {type(error).__name__}: {reason[:160]}"
    return None


def weight_gradients(device: Device) -> str:
    """Returns "added by Apex's product", "added by torch's product", or why neither is used here, for reports."""
    if has_apex():
        return "added by Apex's product"
    if device.kind != "cuda":
        return "not needed without a CUDA device"
    reason = why_no_fusion(device)
    return "added by torch's product" if reason is None else f"in 16 bits first: {reason}"


def choose_fusion(wanted: Any, precision: str, device: Device) -> bool:
    """Returns whether weight gradients are added by the matrix product, for `train.gradient_accumulation_fusion`.

    "auto" is true on CUDA in 16 bits if the device can. On a CPU it would be slower, and in fp32 there is no 16-bit copy.

    Args:
        wanted: "auto", True or False.
        precision: `train.precision`.
        device: of the model.

    Raises:
        EnvironmentFault: it is requested, but this torch cannot do it here.
    """
    if wanted is False or (wanted == "auto" and (device.kind != "cuda" or precision == "fp32")):
        return False
    reason = why_no_fusion(device)
    if reason is not None and wanted != "auto":
        raise EnvironmentFault(f"train.gradient_accumulation_fusion: {reason}; or use false")
    if reason is not None:
        logger.warning("weight gradients are rounded to 16 bits before they are added up: %s", reason)
    return reason is None


def keep_tied_output_apart(network: Any) -> None:
    """Leaves the fusion off in an output layer whose weight is the embedding's on the same stage.

    DDP's hook has to add the embedding's part of that gradient anyway. With the fusion megatron-core would also write
    zeros of the weight's size in each micro-batch, for autograd to add to that part.
    """
    output = getattr(network, "output_layer", None)
    if output is not None and getattr(network.shared_embedding_or_output_weight(), "zero_out_wgrad", False):
        output.gradient_accumulation_fusion = False
