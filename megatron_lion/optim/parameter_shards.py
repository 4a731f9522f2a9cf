"""This rank's slices of parameters, gradients and state; each coordinate of the model is in exactly one slice.

Norms, the KKT residual and the state fingerprint are sums over these slices. Replicas count once: tensor-parallel
duplicates on the first rank of their group, a tied embedding on the first pipeline stage. The padding of gradient
buckets is in no slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_lion.optim.distributed_optimizer import STATE_KEYS, StatefulDistributedOptimizer
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.train_optimizer import TrainOptimizer

TIED_OUTPUT = "output_layer.weight"
TOKEN_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Shard:
    """A slice of one parameter that this rank alone accounts for.

    Attributes:
        name: the parameter's name in the whole model.
        parameter: the model's tensor (this tensor-parallel rank's part of it).
        start: flat index of the slice's first element in `parameter`.
        main: master weights of the slice, fp32 [N]; with a `remainder`, their upper halves, bf16 [N].
        grad: gradient buffer of the slice [N], or None before DDP made one; after the reduction, of the whole batch.
        state: optimizer state of the slice by key, fp32 [N] each.
        weight_decay: λ of the parameter's group.
        remainder: lower halves of split master weights, int16 or int8 [N] (see precision.py), only if they were asked for.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    main: torch.Tensor
    grad: torch.Tensor | None
    state: dict[str, torch.Tensor]
    weight_decay: float
    remainder: torch.Tensor | None = None


def named_global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (name in the whole model, local parameter).

    Layer numbers continue over pipeline stages. The tied output layer has the name of the token embedding.
    """
    numbers: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, TransformerLayer):
            numbers[name + "."] = f"{name.rsplit('.', 1)[0]}.{module.layer_number - 1}."
    for name, parameter in model.named_parameters():
        for prefix, whole in numbers.items():
            if name.startswith(prefix):
                name = whole + name[len(prefix) :]
                break
        while name.startswith("module."):  # DDP and Float16Module each add one
            name = name.removeprefix("module.")
        yield (TOKEN_EMBEDDING if name == TIED_OUTPUT else name), parameter


def counts_here(parameter: torch.nn.Parameter) -> bool:
    """Returns whether this tensor- and pipeline-parallel rank accounts for the parameter."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return param_is_not_shared(parameter) and (split or parallel_state.get_tensor_model_parallel_rank() == 0)


def local_shards(
    model: list[Any], optimizer: TrainOptimizer, *, replicas: bool = False, split: bool = False
) -> Iterator[Shard]:
    """Yields all slices that this rank accounts for; over all ranks they cover the model exactly once.

    Args:
        model: DDP-wrapped chunks.
        optimizer: the optimizer of their parameters.
        replicas: also yield this rank's copies of slices that another rank accounts for.
        split: leave split master weights in two halves; joined, they take 4 bytes an element of new memory.
    """
    wrapper = optimizer.megatron
    decays = optimizer.weight_decays()
    sharded = isinstance(wrapper, StatefulDistributedOptimizer)
    mains = {} if sharded else dict(optimizer.model_and_main_params())
    for chunk in model:
        for name, parameter in named_global_parameters(chunk):
            if not (replicas or counts_here(parameter)):
                continue
            grad = getattr(parameter, "main_grad", None)
            if isinstance(wrapper, StatefulDistributedOptimizer):
                if parameter not in wrapper.model_param_group_index_map:
                    continue
                # mcore 0.19.2: no public method gives a parameter's slice and state; remove when one does.
                span = wrapper._get_model_param_range_map(parameter)["param"]
                halves = _halves(wrapper, parameter) if split else None
                tensors = wrapper._get_main_param_and_optimizer_states(parameter) if halves is None else halves
                state = {key: tensors[key].view(-1) for key in wrapper.state_keys}
                piece = grad.view(-1)[span.start : span.end] if grad is not None else None
                remainder = tensors["remainder"].view(-1) if halves is not None else None
                yield Shard(
                    name, parameter, span.start, tensors["param"].view(-1), piece, state, decays[parameter], remainder
                )
            elif replicas or parallel_state.get_data_parallel_rank() == 0:  # each data-parallel rank holds a whole copy
                main = mains[parameter]
                state = {key: optimizer.inner.state[main][key].view(-1) for key in STATE_KEYS[optimizer.name]}
                piece = grad.view(-1) if grad is not None else None
                yield Shard(name, parameter, 0, main.data.view(-1), piece, state, decays[parameter])


def _halves(wrapper: StatefulDistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor] | None:
    """Returns a parameter's state with its master weights in two halves, or None if they are not stored so."""
    inner = wrapper.optimizer
    if not isinstance(inner, Lion) or inner.layout.is_plain:
        return None
    group, number = wrapper.model_param_group_index_map[parameter]
    own = inner.param_groups[group]["params"][number]
    remainder = inner.state[own]["master_param"]
    if remainder.is_floating_point():
        return None
    return {
        "param": own.detach(),
        "remainder": remainder,
        **{key: inner.get_unscaled_state(own, key) for key in wrapper.state_keys},
    }
