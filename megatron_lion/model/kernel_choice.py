"""The choice between megatron-core's operations and the project's Triton kernels: `model.loss` and `model.elementwise`."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state

from megatron_lion.device import Device
from megatron_lion.errors import EnvironmentFault
from megatron_lion.optim.triton_check import triton_kernel, why_no_triton
from megatron_lion.parallel import all_reduce_sum

logger = logging.getLogger(__name__)


def choose_loss(wanted: str, device: Device) -> str:
    """Returns "megatron", "fused" or "chunked" for `model.loss`; the same on all ranks of a tensor-parallel group, a collective call.

    "auto" is "fused" on CUDA if Triton works on every rank of the group. On a CPU megatron-core's is faster.

    Raises:
        EnvironmentFault: "fused" or "chunked" is requested but Triton cannot run here. On a CPU only its interpreter runs, for
            tests.
    """
    return _choose("model.loss", wanted, device, "computes the loss, which takes more memory")


def choose_elementwise(wanted: str, device: Device, attention: str) -> str:
    """Returns "megatron" or "fused" for `model.elementwise`, as `choose_loss`.

    "auto" is "megatron" too if Transformer Engine's layers are used, which have their own kernels.

    Args:
        wanted: the setting.
        device: the device of the model.
        attention: from `choose_attention`.

    Raises:
        EnvironmentFault: "fused" is requested but Triton cannot run here, or Transformer Engine's layers are used.
    """
    if attention == "transformer_engine":
        if wanted == "fused":
            raise EnvironmentFault(
                "model.elementwise: fused: Transformer Engine is installed, and its layers have kernels of their own; use auto, "
                "or set model.attention sdpa"
            )
        return "megatron"
    return _choose("model.elementwise", wanted, device, "computes the layers' element-wise operations, which is slower")


def _choose(key: str, wanted: str, device: Device, consequence: str) -> str:
    if wanted == "megatron" or (wanted == "auto" and device.kind != "cuda"):
        return "megatron"
    reason = why_no_triton()
    if reason is None and device.kind != "cuda" and triton_kernel() != "interpreted":
        reason = "device cpu is used; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
    if wanted != "auto":
        if reason is not None:
            raise EnvironmentFault(f"{key}: {wanted}: {reason}; or use auto or megatron")
        return wanted
    if reason is not None:
        logger.warning("Triton cannot run kernels on this machine, so megatron-core %s: %s", consequence, reason)
    # The two losses have different collectives in the group, and the two dropouts different masks, which the ranks of a group
    # must share: one rank without a compiler decides for all.
    failed = torch.tensor([0.0 if reason is None else 1.0], device=device.torch_device)
    return "megatron" if all_reduce_sum(failed, parallel_state.get_tensor_model_parallel_group()).item() else "fused"


def loss_on_this_machine(device: Device) -> str:
    """Returns what "auto" is for a process alone, "fused" or "megatron", with the reason.

    >>> loss_on_this_machine(Device("cpu", 0, "gloo"))
    'megatron: the device is a CPU, on which it is faster'
    """
    if device.kind != "cuda":
        return "megatron: the device is a CPU, on which it is faster"
    reason = why_no_triton()
    return "fused: Triton runs its kernels" if reason is None else f"megatron: no Triton, {reason}"
