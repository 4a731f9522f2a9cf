"""LION, SGD and AdamW inside megatron-core's DistributedOptimizer (ZeRO-1), behind one small interface.

Upstream's `--optimizer lion` is another optimizer: it updates only matrices, leaves the rest to Adam and is not sharded.
Its DistributedOptimizer refuses SGD. Here all three run on the same fp32 master shards, with Megatron's decay
exemptions, clipping and loss scaling. A gate skips every step whose gradient holds a NaN or infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import _get_param_groups_and_buffers, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_lion.config import OptimizerConfig
from megatron_lion.optim.distributed_optimizer import (
    STATE_KEYS,
    FusedDistributedOptimizer,
    StatefulDistributedOptimizer,
    let_optimizer_own_master_weights,
)
from megatron_lion.optim.grad_norm import let_replicas_reach_the_norm
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.sgd import Sgd

__all__ = ["StepResult", "TrainOptimizer", "build_optimizer"]

# Below upstream's 1: the scale multiplies a sum over tokens.
SMALLEST_LOSS_SCALE = 2.0**-24


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Attributes:
        grad_l2: norm of the whole gradient before clipping; NaN or infinite if the step was skipped.
        skipped: True if nothing was changed, because a gradient was not finite or `skip` was called.
    """

    grad_l2: float
    skipped: bool


class TrainOptimizer:
    """The training loop's interface to the optimizer: set a rate, step, save, load.

    Built by `build_optimizer`. `inner` is the torch optimizer, `megatron` megatron-core's wrapper around it.
    """

    def __init__(self, megatron: MegatronOptimizer, inner: torch.optim.Optimizer, name: str, clip_grad: float) -> None:
        self.megatron = megatron
        self.inner = inner
        self.name = name
        self.clip_grad = clip_grad
        self.num_steps = 0
        self.num_skipped = 0

    def zero_grad(self) -> None:
        """Clears the gradients of the optimizer's parameters."""
        self.megatron.zero_grad()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss times the fp16 loss scale (1 in bf16 and fp32); megatron-core's grad_scale_func."""
        return self.megatron.scale_loss(loss)

    def set_lr(self, lr: float) -> None:
        """Sets each group's rate to `lr` times its lr_mult."""
        for group in self.megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)

    @property
    def divides_by_count(self) -> bool:
        """Whether `start_step` can divide the gradient by the loss's count: the fused step in Triton, as it reads it."""
        return isinstance(self.megatron, FusedDistributedOptimizer) and self.megatron.divides_in_kernel()

    @property
    def changes_with_gradient(self) -> bool:
        """Whether measuring the gradient changes the state: fp16's loss scale adapts to it."""
        return getattr(self.megatron, "grad_scaler", None) is not None

    def step(self) -> StepResult:
        """Measures the gradient, then either updates, or changes nothing on any rank."""
        return self.end_step(float(self.start_step()))

    @torch.no_grad()
    def start_step(self, *, divisor: torch.Tensor | None = None, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Launches all that needs no decision of the host; a collective call.

        The fused step is complete then, and has skipped itself if it must. The others have measured the gradient.

        Args:
            divisor: count by which the gradient is divided, float64 [1] on the device; only if `divides_by_count`.
            counts: if one of them is not above 0 the step is skipped, float64 [K] on the device; or None.

        Returns:
            Norm of the mean gradient before clipping, float64 [], for `end_step`.
        """
        if isinstance(self.megatron, FusedDistributedOptimizer):
            return self.megatron.fused_step(self.clip_grad, divisor=divisor, counts=counts)
        found_inf = self.megatron.prepare_grads()
        if not found_inf and isinstance(self.megatron, StatefulDistributedOptimizer):
            return self.megatron.step_scalars(0.0).norm
        norm = math.nan if found_inf else float(self.megatron.get_grad_norm())
        return torch.full((), norm, dtype=torch.float64, device=torch.cuda.current_device())

    @torch.no_grad()
    def end_step(self, grad_l2: float, *, undefined: bool = False) -> StepResult:
        """Ends the step that `start_step` began: updates if the fused step has not, and counts.

        The norm is the gate: it is reduced over all ranks, and it is finite only if every gradient is. sign() would
        turn a NaN into a zero and an infinity into a unit step, and no loss curve would show it.

        Args:
            grad_l2: the norm that `start_step` returned.
            undefined: whether one of its `counts` was not above 0.
        """
        skipped = undefined or not math.isfinite(grad_l2)
        if not isinstance(self.megatron, FusedDistributedOptimizer):
            if not skipped:
                if self.clip_grad > 0.0:
                    clip_grad_by_total_norm_fp32(self.megatron.get_parameters(), self.clip_grad, grad_l2)
                self.megatron.step_with_ready_grads()
            # Without shards `.grad` is the gradient buffer itself. If it stayed set, the next accumulation in the buffer,
            # such as a probe's, would be added twice.
            self.zero_grad()
        self.num_skipped += skipped
        self.num_steps += not skipped
        return StepResult(math.nan if undefined else grad_l2, skipped)

    def skip(self) -> StepResult:
        """Counts a step that the caller does not take; no gradient is read and nothing is changed, not even the loss scale."""
        self.zero_grad()
        self.num_skipped += 1
        return StepResult(math.nan, True)

    def weight_decays(self) -> dict[torch.nn.Parameter, float]:
        """Returns the decay of each model parameter of this rank: the λ of its group, 0 if exempt."""
        groups = self.megatron.param_groups
        if isinstance(self.megatron, StatefulDistributedOptimizer):
            return {
                parameter: float(groups[group]["weight_decay"])
                for parameter, (group, _) in self.megatron.model_param_group_index_map.items()
            }
        models = {main: model for model, main in self.model_and_main_params()}
        return {models[main]: float(group["weight_decay"]) for group in groups for main in group["params"]}

    def extra_state(self) -> dict[str, Any]:
        """Returns the optimizer's plain numbers, for the manifest: step counters and the loss scale."""
        scaler = getattr(self.megatron, "grad_scaler", None)
        extra: dict[str, Any] = {"num_steps": self.num_steps, "num_skipped": self.num_skipped}
        if scaler is not None:
            # mcore 0.19.2: the scaler's state_dict holds tensors, and a manifest holds plain numbers; remove when they are public.
            extra["grad_scaler"] = {
                "scale": float(scaler.scale),
                "growth_tracker": int(scaler._growth_tracker),
                "hysteresis_tracker": int(scaler._hysteresis_tracker),
            }
        return extra

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Restores the numbers that `extra_state` returned."""
        self.num_steps, self.num_skipped = int(extra["num_steps"]), int(extra["num_skipped"])
        scaler = getattr(self.megatron, "grad_scaler", None)
        if scaler is not None and "grad_scaler" in extra:
            saved = extra["grad_scaler"]
            scaler.load_state_dict(
                {
                    "scale": torch.tensor([saved["scale"]]),
                    "growth_tracker": saved["growth_tracker"],
                    "hysteresis_tracker": saved["hysteresis_tracker"],
                }
            )
        for state in self.inner.state.values():
            if "step" in state:  # a checkpoint's tensors hold no step; AdamW's bias correction needs it
                state["step"].fill_(float(self.num_steps))

    def state_form(self) -> dict[str, str]:
        """Returns the forms of master weights and momentum; a checkpoint holds their values in fp32."""
        if isinstance(self.megatron, FusedDistributedOptimizer) and isinstance(self.inner, Lion):
            return {"master_weights": self.inner.layout.master_weights, "momentum": self.inner.layout.momentum}
        return {"master_weights": "shards", "momentum": "fp32"}

    def rounds_state_of(self, form: dict[str, str], *, same_shards: bool) -> bool:
        """Returns whether loading rounds a state that was saved in another form or with other shards.

        Args:
            form: `state_form` of the saved state.
            same_shards: whether this rank's shards have the bounds they had when saved; int8 momentum is packed in
                blocks of 32 neighbours of a shard.
        """
        own = self.state_form()
        master_kept = own["master_weights"] in ("shards", "fp32", "split32", form["master_weights"])
        momentum_kept = own["momentum"] in ("fp32", form["momentum"]) and (own["momentum"] != "int8" or same_shards)
        return not (master_kept and momentum_kept)

    def sharded_state(self, model_state: dict[str, Any], *, is_loading: bool, layout: str) -> dict[Any, Any]:
        """Returns master weights and optimizer state as megatron-core ShardedTensors, tensors only.

        Args:
            model_state: the model's sharded_state_dict(keep_vars=True), which names and places every parameter.
            is_loading: whether the tensors are destinations.
            layout: "fully_reshardable" or "dp_reshardable".
        """
        if isinstance(self.megatron, StatefulDistributedOptimizer):
            return self.megatron.sharded_tensors(model_state, is_loading=is_loading, layout=layout)
        places = {item.data: item for item in model_state.values() if isinstance(item, ShardedTensor)}
        state: dict[Any, Any] = {}
        for number, (model_param, main_param) in enumerate(self.model_and_main_params()):
            place = places[model_param]
            tensors = {
                "param": main_param,
                **{key: self.inner.state[main_param][key] for key in STATE_KEYS[self.name]},
            }
            state[number] = {
                key: replace(place, key=f"optimizer.state.{key}.{place.key}", data=tensor.data, dtype=tensor.dtype)
                for key, tensor in tensors.items()
            }
        return state

    def load_sharded_state(self, state: dict[Any, Any], *, layout: str) -> None:
        """Copies tensors that were loaded into `sharded_state` into master weights and optimizer state."""
        if isinstance(self.megatron, StatefulDistributedOptimizer):
            self.megatron.load_sharded_tensors(state, layout=layout)
            return
        for number, (_, main_param) in enumerate(self.model_and_main_params()):
            for key, loaded in state[number].items():
                target = main_param.data if key == "param" else self.inner.state[main_param][key]
                target.copy_(loaded)

    def model_and_main_params(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Returns (model parameter, whole master copy) pairs, for optimizers without shards."""
        optimizer = self.megatron
        if isinstance(optimizer, Float16OptimizerWithFloat16Params):
            pairs = [
                pair
                for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
                for pair in zip(models, mains, strict=True)
            ]
            return pairs + [(p, p) for group in optimizer.fp32_from_fp32_groups for p in group]
        return [(p, p) for group in optimizer.param_groups for p in group["params"]]


def build_inner_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Builds the torch optimizer that `config.name` names, over Megatron's parameter groups."""
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    betas = config.resolved_betas()
    if config.name == "lion":
        master = "none" if config.master_weights == "shards" else config.master_weights
        return Lion(
            groups,
            betas=betas,
            init_exp_avg=config.init_exp_avg,
            master_weights=master,
            momentum=config.momentum_dtype,
            **common,
        )
    if config.name == "sgd":
        return Sgd(groups, momentum=config.momentum, coupled_weight_decay=config.coupled_weight_decay, **common)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True, **common)


def initialize_state(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Creates every state tensor at once, for a checkpoint to be loaded into an optimizer that never stepped.

    Without it megatron-core loads into state from torch.empty.
    """
    if isinstance(optimizer, Lion):
        optimizer.init_state()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for key in STATE_KEYS[name]:
                if key not in state:
                    state[key] = torch.zeros_like(parameter, dtype=torch.float32)
            if name == "adamw" and "step" not in state:
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=parameter.device
                )  # where fused AdamW reads it


def first_loss_scale(micro_batch_count: int) -> float:
    """Returns fp16's first loss scale, a power of two.

    The scaled loss is a sum over a micro-batch, not a mean: upstream's 2^16, meant for a mean, would overflow in the first
    steps until it was halved often enough, and each of them would be skipped. 2^12 for a mean leaves the weight
    gradients, which are sums over tokens as well, room below fp16's 65,504. From there it grows every 1000 steps.

    >>> first_loss_scale(1), first_loss_scale(8 * 1024), first_loss_scale(100)
    (4096.0, 0.5, 32.0)
    """
    return 2.0 ** (12 - math.ceil(math.log2(max(1, micro_batch_count))))


def build_optimizer(
    config: OptimizerConfig,
    model_chunks: list[DistributedDataParallel],
    *,
    precision: str = "bf16",
    micro_batch_count: int = 1,
) -> TrainOptimizer:
    """Builds the optimizer for DDP-wrapped model chunks.

    With the chunks' `use_distributed_optimizer`, each data-parallel rank holds one slice of each bucket's master weights
    (fp32) and state. Otherwise every rank holds all of them. Biases and one-dimensional parameters are exempt from
    weight decay unless `config.decay_all`.

    Args:
        config: name, rate, decay and the rest.
        model_chunks: from `build_model`.
        precision: "bf16", "fp32" or "fp16" (with a dynamic loss scale; see `first_loss_scale`).
        micro_batch_count: what the loss counts in a micro-batch.
    """
    sharded = model_chunks[0].ddp_config.use_distributed_optimizer
    master_weights: Any = config.resolved_master_weights(precision, is_sharded=sharded)
    config = replace(config, master_weights=master_weights)
    settings = McoreOptimizerConfig(
        optimizer={"lion": "lion", "sgd": "sgd", "adamw": "adam"}[config.name],
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision],
        use_distributed_optimizer=sharded,
        clip_grad=config.clip_grad,
        overlap_param_gather=model_chunks[0].ddp_config.overlap_param_gather,
    )
    overrides = {} if config.decay_all else get_standard_config_overrides(settings)
    # mcore 0.19.2: the public get_megatron_optimizer builds Adam, SGD or its own LION on these groups; remove when it takes
    # the inner optimizer as an argument.
    groups, buffers = _get_param_groups_and_buffers(
        model_chunks, 0, settings, overrides, filter_fn=lambda group: True, buffer_name="buffers"
    )
    for group in groups:
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    scaler = None
    if precision == "fp16":
        scaler = DynamicGradScaler(
            initial_scale=first_loss_scale(micro_batch_count),
            min_scale=SMALLEST_LOSS_SCALE,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=1000,
            hysteresis=2,
        )
    inner = build_inner_optimizer(config, groups)

    # megatron-core requires such a function.
    def state_is_made_here(*_: Any) -> None:
        initialize_state(inner, config.name)

    megatron: MegatronOptimizer
    if sharded:
        # False: `megatron_lion.parallel.process_groups` builds no gloo groups.
        process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(None, model_chunks, False)
        kind = StatefulDistributedOptimizer
        if config.master_weights != "shards":
            kind = FusedDistributedOptimizer
            let_optimizer_own_master_weights(settings)
        megatron = kind(
            inner,
            settings,
            scaler,
            state_is_made_here,
            model_chunks=model_chunks,
            per_model_buffers=buffers,
            data_parallel_group=process_groups["intra_dp_cp_group"],
            data_parallel_group_gloo=process_groups["intra_dp_cp_group_gloo"],
            data_parallel_group_idx=process_groups["mp_group"].rank(),
            distributed_optimizer_instance_id=0,
        )
        megatron.state_keys = STATE_KEYS[config.name]
        megatron.grad_stats_parallel_group = process_groups["intra_dist_opt_group"]
    elif precision == "fp32":
        megatron = FP32Optimizer(inner, settings, state_is_made_here)
        megatron.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    else:
        megatron = Float16OptimizerWithFloat16Params(inner, settings, scaler, state_is_made_here)
        megatron.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    megatron.tp_group = megatron.expert_tp_group = parallel_state.get_tensor_model_parallel_group()
    if not sharded:  # StatefulDistributedOptimizer does so itself
        let_replicas_reach_the_norm(megatron)
    initialize_state(inner, config.name)
    return TrainOptimizer(megatron, inner, config.name, config.clip_grad)
