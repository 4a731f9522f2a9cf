"""LION's packed state: its tensors, how a step reads and writes them, and the dtypes and β2 it allows.

The plain form, `PlainLayout`, is in update.py, so that lion.py and update.py work without this file. The number formats
are in precision.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .precision import REMAINDER_DTYPES, decode_state, int8_bytes, pack_int8, split_master
from .update import PlainLayout, Slot

# A bfloat16 momentum has 8 bits. If a step shrinks it by less than 2^-8, it is rounded back to the old value and never
# decays; an embedding row that no batch touches would then move for ever.
MAX_PACKED_BETA2 = 1 - 2**-8


class PackedLayout(PlainLayout):
    """State with `master_param` and `exp_avg` in the chosen forms.

    A float32 parameter is its own master: its `master_param` is the parameter itself. Every tensor of the state has
    the parameter's memory layout, except the packed int8 momentum, which is flat and uint8.
    """

    is_plain = False

    def __init__(self, master_weights: str, momentum: str) -> None:
        self.master_weights = master_weights
        self.momentum = momentum

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError if a parameter's dtype or β2 does not suit the chosen forms."""
        for param in group["params"]:
            self._check_dtype(param)
            if self.momentum == "int8" and hasattr(param, "to_local"):
                raise ValueError("momentum = 'int8' with DTensor parameters: needs momentum = 'fp32' or 'bf16'")
        if self.momentum != "fp32" and group["betas"][1] > MAX_PACKED_BETA2:
            raise ValueError(
                f"momentum = {self.momentum!r} with betas = {group['betas']}: needs the second at most "
                f"{MAX_PACKED_BETA2}, else rounding keeps the momentum from shrinking; or use momentum = 'fp32'"
            )

    def _check_dtype(self, param: torch.Tensor) -> None:
        allowed = [torch.float32, torch.bfloat16]
        if self.master_weights in ("none", "fp32"):
            allowed.append(torch.float16)
        if param.dtype not in allowed:
            raise ValueError(
                f"master_weights = {self.master_weights!r}, momentum = {self.momentum!r} with a parameter of "
                f"{param.dtype}: needs one of {', '.join(map(str, allowed))}"
            )

    def forms(self, param: torch.Tensor) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
        """Returns the dtype and shape that each state tensor of a parameter must have.

        Raises:
            ValueError: the parameter's dtype, which may have changed, does not suit this layout.
        """
        self._check_dtype(param)
        forms: dict[str, tuple[torch.dtype, Sequence[int]]] = {
            "exp_avg": (torch.float32 if self.momentum == "fp32" else torch.bfloat16, param.shape)
        }
        if self.momentum == "int8":
            forms["exp_avg"] = (torch.uint8, (int8_bytes(param.numel()),))
        if self.master_weights != "none":
            is_own_master = param.dtype == torch.float32
            dtype = torch.float32 if is_own_master else REMAINDER_DTYPES.get(self.master_weights, torch.float32)
            forms["master_param"] = (dtype, param.shape)
        return forms

    def new_state(self, param: torch.Tensor, start: float) -> dict[str, torch.Tensor]:
        """Returns a momentum whose elements are all `start`, and a master weight equal to the parameter."""
        state = {}
        if self.momentum == "int8":
            state["exp_avg"] = pack_int8(torch.full((param.numel(),), start, device=param.device))
        else:
            dtype = torch.float32 if self.momentum == "fp32" else torch.bfloat16
            state["exp_avg"] = torch.full_like(param, start, dtype=dtype, requires_grad=False)
        if self.master_weights != "none":
            state["master_param"] = self._new_master(param.detach())
        return state

    def fit(self, param: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """As in the plain layout, but int8 momentum cannot change its memory order, in which its blocks are packed.

        The master weight of a float32 parameter is the parameter itself. It is taken again, because a copy of the optimizer
        or an assignment to `param.data` parts the two, and a checkpoint would then hold an old master weight.

        Raises:
            ValueError: momentum is int8 and the parameter is not contiguous.
        """
        if self.momentum == "int8" and not param.is_contiguous():
            raise ValueError(
                f"momentum = 'int8' with a parameter of shape {tuple(param.shape)}, strides {param.stride()}: needs a "
                "contiguous one; keep the model out of channels_last, or use momentum = 'bf16'"
            )
        if param.dtype == torch.float32 and "master_param" in state and state["master_param"].dtype == torch.float32:
            state["master_param"] = param.detach()
        super().fit(param, state)

    def _new_master(self, param: torch.Tensor) -> torch.Tensor:
        if param.dtype == torch.float32:
            return param
        if self.master_weights == "fp32":
            return param.to(torch.float32)
        # The bfloat16 parameter is its own upper half, so nothing remains.
        return torch.zeros_like(param, dtype=REMAINDER_DTYPES[self.master_weights])

    def read(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns master weight and momentum in float32."""
        param, state = slot.param, slot.state
        master = state.get("master_param")
        if master is None or param.dtype == torch.float32:
            param_N = param.to(torch.float32)
        else:
            param_N = decode_state(param, master)
        return param_N, decode_state(param, state["exp_avg"])

    def write(self, slot: Slot, param_N: torch.Tensor, exp_avg_N: torch.Tensor) -> None:
        """Stores both in their forms, and sets the 16-bit parameter from the master weight."""
        if "master_param" in slot.state and slot.param.dtype != torch.float32:
            self.encode(slot.param, slot.state, "master_param", param_N)
        elif slot.param is not param_N:
            slot.param.copy_(param_N)
        if slot.state["exp_avg"] is not exp_avg_N:
            self.encode(slot.param, slot.state, "exp_avg", exp_avg_N)

    def encode(self, param: torch.Tensor, state: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        """Stores a state given in any form; a master weight also sets the parameter."""
        if name not in state:  # a master weight that this layout keeps in the parameter itself
            super().encode(param, state, name, decode_state(param, value))
            return
        stored = state[name]
        # A value already in the stored form is copied without conversion, so it keeps its bits.
        if value.dtype == stored.dtype and value.numel() == stored.numel():
            if stored is not value:
                stored.copy_(value.view(stored.shape))
        else:
            value = decode_state(param, value)
            if stored.dtype == torch.uint8:
                stored.copy_(pack_int8(value))
            elif stored.is_floating_point():
                stored.copy_(value)
            else:
                hi, lo = split_master(value, self.master_weights)
                param.copy_(hi)
                stored.copy_(lo)
        if name == "master_param" and stored.dtype == torch.float32 and param.dtype != torch.float32:
            param.copy_(stored)
