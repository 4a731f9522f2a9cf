"""The one place that reaches into DistributedOptimizer's private parts; tests/optim/test_upstream.py watches them.

Corrections, each in a fixed form:
- mcore 0.19.2: `get_parameter_state_dp_zero` drops the padding at bucket ends while its caller slices by offsets that
  include it, so that a fully reshardable checkpoint of a model with padded buckets holds shifted state; remove
  `get_parameter_state_dp_zero` below when it keeps the padding.
- mcore 0.19.2: loaded tensors hold no "step" although the state does (KeyError without Transformer Engine); remove
  `_set_main_param_and_optimizer_states` below when it asks for the keys it was given.
- mcore 0.19.2: state keys are those of Adam unless the optimizer is called lion; remove `optimizer_state_keys` below
  when they come from the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

STATE_KEYS = {"lion": ("exp_avg",), "sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class StatefulDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer for any inner optimizer whose state is made eagerly and named in `state_keys`."""

    state_keys: tuple[str, ...] = ()

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return self.state_keys

    def _set_main_param_and_optimizer_states(
        self, model_param: torch.Tensor, tensors: dict[str, Any]
    ) -> None:
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        state = super().get_parameter_state_dp_zero(use_gloo_comm, empty_data, return_on_all_ranks)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for world_tensors in state[index].values():
                for key in ("param", *self.optimizer_state_keys):
                    world_tensors[key] = _with_bucket_padding(world_tensors[key], buffer.buckets)
        return state

    def sharded_tensors(
        self, model_state: dict[str, Any], *, is_loading: bool, layout: str
    ) -> dict[Any, Any]:
        """State as ShardedTensors; the few plain numbers of the dp_reshardable layout stay out (the manifest has them)."""
        if layout == "fully_reshardable":
            return self.sharded_param_state_fully_reshardable(model_state, is_loading, {})
        state = self.sharded_param_state_dp_reshardable(model_state, is_loading, {})
        return {
            key: LocalNonpersistentObject(value.data) if isinstance(value, ShardedObject) else value
            for key, value in state.items()
        }

    def load_sharded_tensors(self, state: dict[Any, Any], *, layout: str) -> None:
        if layout == "fully_reshardable":
            self.load_parameter_state_from_fully_reshardable(state)
        else:
            self.load_parameter_state_from_dp_reshardable(state)

    def bucket_sizes(self) -> list[Any]:
        """Elements of each bucket without padding: equal in two runs that can exchange dp_reshardable state."""
        return [sizes for buffer in self.per_bucket_numel_unpadded for sizes in buffer.values()]


def _with_bucket_padding(packed: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """Spreads buckets that lie end to end to the offsets they have in the buffer (padding filled with zeros)."""
    total = buckets[-1].offset + buckets[-1].grad_data.numel()
    spread = torch.zeros(total, dtype=packed.dtype, device=packed.device)
    start = 0
    for bucket in buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[
            start : start + bucket.numel_unpadded
        ]
        start += bucket.numel_unpadded
    return spread
