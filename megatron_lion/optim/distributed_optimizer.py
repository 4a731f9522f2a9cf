"""megatron-core's DistributedOptimizer for any inner optimizer: corrected saving and loading, and the fused step.

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
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

STATE_KEYS = {"lion": ("exp_avg",), "sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class StatefulDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer for any inner optimizer whose state is made eagerly and named in `state_keys`."""

    state_keys: tuple[str, ...] = ()

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return self.state_keys

    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
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

    def sharded_tensors(self, model_state: dict[str, Any], *, is_loading: bool, layout: str) -> dict[Any, Any]:
        """State as ShardedTensors; the few plain numbers of the dp_reshardable layout stay out (the manifest has them)."""
        if layout == "fully_reshardable":
            return self.sharded_param_state_fully_reshardable(model_state, is_loading, {})
        state = self.sharded_param_state_dp_reshardable(model_state, is_loading, {})
        return {
            key: LocalNonpersistentObject(value.data) if isinstance(value, ShardedObject) else value
            for key, value in state.items()
        }

    @torch.no_grad()  # fp32 master weights are views of the parameters themselves
    def load_sharded_tensors(self, state: dict[Any, Any], *, layout: str) -> None:
        if layout == "fully_reshardable":
            self.load_parameter_state_from_fully_reshardable(state)
        else:
            self.load_parameter_state_from_dp_reshardable(state)

    def bucket_sizes(self) -> list[Any]:
        """Elements of each bucket without padding: equal in two runs that can exchange dp_reshardable state."""
        return [sizes for buffer in self.per_bucket_numel_unpadded for sizes in buffer.values()]


class FusedDistributedOptimizer(StatefulDistributedOptimizer):
    """The precision-aware mode: the inner optimizer owns the master weights and writes the bf16 shard itself.

    No main→model copy, no gradient cast and no scaling pass run: the gradient buffer is read in place, and the clip
    coefficient and the non-finite flag reach the kernel in device memory. Nothing waits for the device until the
    caller reads the norm.
    """

    @torch.no_grad()
    def fused_step(self, clip_grad: float) -> torch.Tensor:
        """One update.

        Args:
            clip_grad: largest global gradient norm; 0 switches clipping off.

        Returns:
            The gradient's norm before clipping, a float64 scalar on the device; where it is not finite, nothing was changed.
        """
        self.prepare_grads()
        norm = self._grad_norm_on_device()
        coefficient = None
        if clip_grad > 0.0:
            # In float64 and then rounded, as upstream's Python arithmetic does: equal bits either way.
            coefficient = (clip_grad / (norm + 1.0e-6)).clamp(max=1.0).float()
        self.optimizer.step(grad_multiplier=coefficient, found_inf=(~torch.isfinite(norm)).float())
        if not self.ddp_config.overlap_param_gather:
            self.start_param_sync_for_bucket_group_subset()
        return norm

    @torch.no_grad()
    def load_sharded_tensors(self, state: dict[Any, Any], *, layout: str) -> None:
        """As the base class; a master weight sets its bf16 parameter too, which the other ranks then need as well."""
        super().load_sharded_tensors(state, layout=layout)
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)

    def _grad_norm_on_device(self) -> torch.Tensor:
        """What upstream's get_grad_norm_fp32 computes, bit for bit on a CPU, waiting for nothing.

        mcore 0.19.2: without Transformer Engine and Apex its norm reads every tensor's part on the host; remove when it
        does not.
        """
        grads = self.get_grads_for_grad_norm()
        total = torch.zeros((), dtype=torch.float, device=torch.cuda.current_device())
        if grads:
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float))) ** 2
        torch.distributed.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return total.double().sqrt()


def let_optimizer_own_master_weights(settings: OptimizerConfig) -> None:
    """Switches a megatron-core config to the precision-aware mode.

    mcore 0.19.2: its __post_init__ allows the mode for Transformer Engine's Adam only, although DistributedOptimizer asks no more than
    get_unscaled_state and set_scaled_state of the optimizer; remove when it takes any optimizer that has them.
    """
    settings.use_precision_aware_optimizer = True
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False


def _with_bucket_padding(packed: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """Spreads buckets that lie end to end to the offsets they have in the buffer (padding filled with zeros)."""
    total = buckets[-1].offset + buckets[-1].grad_data.numel()
    spread = torch.zeros(total, dtype=packed.dtype, device=packed.device)
    start = 0
    for bucket in buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return spread
