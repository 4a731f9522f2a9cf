"""megatron-core's DistributedOptimizer for any inner optimizer: correct saving and loading, and the fused step.

Corrections of upstream, each with the fact and when to remove it:
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

from megatron_lion.optim.grad_norm import (
    StepScalars,
    TritonNorm,
    plain_scalars,
    replicas_of,
    runs_in_triton,
    with_replicas,
)
from megatron_lion.optim.state_owners import states_to_load, states_to_save

STATE_KEYS = {"lion": ("exp_avg",), "sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class StatefulDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer for any inner optimizer whose state is created eagerly and listed in `state_keys`."""

    state_keys: tuple[str, ...] = ()
    triton_norm: TritonNorm | None = None  # on CUDA from the first step on

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return self.state_keys

    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        # super() asks for every tensor of the state, and skips a value that is no tensor: `step` keeps its value.
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[torch.Tensor]:
        """Returns upstream's list and, if this rank holds replicas that it leaves out, a scalar: 0, or NaN if one is not finite."""
        counted = super().get_grads_for_grad_norm(grad_norm_group)
        return with_replicas(counted, replicas_of(self, counted))

    def sharded_tensors(self, model_state: dict[str, Any], *, is_loading: bool, layout: str) -> dict[Any, Any]:
        """Returns the state as ShardedTensors; a collective call. The dp_reshardable layout's plain numbers are left out (the
        manifest has them).

        Args:
            model_state: the model's sharded state.
            is_loading: whether the tensors are destinations.
            layout: "fully_reshardable" or "dp_reshardable".
        """
        if layout == "fully_reshardable":
            return states_to_load(self, model_state) if is_loading else states_to_save(self, model_state)
        state = self.sharded_param_state_dp_reshardable(model_state, is_loading, {})
        return {
            key: LocalNonpersistentObject(value.data) if isinstance(value, ShardedObject) else value
            for key, value in state.items()
        }

    @torch.no_grad()  # fp32 master weights are views of the parameters, which autograd forbids writing in place
    def load_sharded_tensors(self, state: dict[Any, Any], *, layout: str) -> None:
        """Copies tensors that were loaded into `sharded_tensors` into master weights and optimizer state."""
        if layout == "fully_reshardable":
            self.load_parameter_state_from_fully_reshardable(state)
        else:
            self.load_parameter_state_from_dp_reshardable(state)

    def step_scalars(
        self, clip_grad: float, *, divisor: torch.Tensor | None = None, counts: torch.Tensor | None = None
    ) -> StepScalars:
        """Measures the gradient that `prepare_grads` set, without a wait for the device; a collective call.

        mcore 0.19.2: without Transformer Engine and Apex its norm reads each tensor's norm on the host; remove when it
        does not.

        Args:
            clip_grad: largest global gradient norm; 0 turns clipping off.
            divisor: count by which the gradient is divided, float64 [1]; only with `triton_norm`.
            counts: if one of them is not above 0 the step is skipped, float64 [K]; or None.
        """
        device = torch.device(torch.cuda.current_device())
        group = self.get_grad_stats_parallel_group()
        if self.triton_norm is None and runs_in_triton(device):
            self.triton_norm = TritonNorm(device, group)
        if self.triton_norm is not None:
            counted = super().get_grads_for_grad_norm()
            replicas = replicas_of(self, counted)
            return self.triton_norm.scalars(counted, replicas, clip_grad, divisor=divisor, counts=counts)
        return plain_scalars(self.get_grads_for_grad_norm(), group, clip_grad, counts, device)

    def bucket_sizes(self) -> list[Any]:
        """Returns the elements of each bucket without padding; runs with equal ones can exchange dp_reshardable state."""
        return [sizes for buffer in self.per_bucket_numel_unpadded for sizes in buffer.values()]


class FusedDistributedOptimizer(StatefulDistributedOptimizer):
    """The precision-aware mode: the inner optimizer owns the master weights and writes the bf16 shard itself.

    No main→model copy and no gradient cast run: the gradient buffer is read in place, and the clip coefficient and the
    flag that skips a step reach the kernel in device memory. On CUDA the division by the loss's count does so too (on a
    CPU megatron-core scales the buffer). The host does not wait for the device until the caller reads the norm.
    """

    def divides_in_kernel(self) -> bool:
        """Returns whether `fused_step` can take a divisor."""
        return self.triton_norm is not None or runs_in_triton(torch.device(torch.cuda.current_device()))

    @torch.no_grad()
    def fused_step(
        self, clip_grad: float, *, divisor: torch.Tensor | None = None, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Takes one update.

        The arguments are those of `step_scalars`.

        Returns:
            The norm of the mean gradient before clipping, a float64 scalar on the device. Nothing was changed if it is not
            finite, or if one of `counts` is not above 0.
        """
        self.prepare_grads()
        scalars = self.step_scalars(clip_grad, divisor=divisor, counts=counts)
        self.optimizer.step(grad_multiplier=scalars.multipliers, found_inf=scalars.found_inf)
        # Each rank wrote its own bf16 shard. With overlap the next forward pass gathers each bucket before it is used.
        if not self.ddp_config.overlap_param_gather:
            self.start_param_sync_for_bucket_group_subset()
        return scalars.norm

    @torch.no_grad()
    def load_sharded_tensors(self, state: dict[Any, Any], *, layout: str) -> None:
        """Loads as the base class does, then gathers the bf16 parameters that the loaded master weights changed."""
        super().load_sharded_tensors(state, layout=layout)
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)  # waits also with overlap: the caller may read the weights next


def let_optimizer_own_master_weights(settings: OptimizerConfig) -> None:
    """Switches a megatron-core config to the precision-aware mode.

    mcore 0.19.2: its __post_init__ allows the mode for Transformer Engine's Adam only, although DistributedOptimizer needs
    only get_unscaled_state and set_scaled_state; remove when it takes any optimizer that has them.
    """
    settings.use_precision_aware_optimizer = True
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False  # for Transformer Engine's Adam; our layouts split the masters themselves
