"""The choice of how the cross-entropy is computed: `model.loss`."""

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
    if wanted == "megatron" or (wanted == "auto" and device.kind != "cuda"):
        return "megatron"
    reason = why_no_triton()
    if reason is None and device.kind != "cuda" and triton_kernel() != "interpreted":
        reason = "device cpu is used; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
    if wanted != "auto":
        if reason is not None:
            raise EnvironmentFault(f"model.loss: {wanted}: {reason}; or use auto or megatron")
        return wanted
    if reason is not None:
        logger.warning(
            "Triton cannot run kernels on this machine, so megatron-core computes the loss, which takes more memory: %s",
            reason,
        )
    # The two losses have different collectives in the group, so one rank without a compiler decides for all.
    failed = torch.tensor([0.0 if reason is None else 1.0], device=device.torch_device)
    return "megatron" if all_reduce_sum(failed, parallel_state.get_tensor_model_parallel_group()).item() else "fused"
