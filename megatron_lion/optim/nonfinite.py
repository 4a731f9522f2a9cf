"""Finds NaN and infinities in weights, master weights, optimizer state and gradients, and names the tensor they are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lion.optim.lion import Lion
from megatron_lion.optim.parameter_shards import local_shards, named_global_parameters
from megatron_lion.optim.train_optimizer import TrainOptimizer

_CHUNK = 1 << 22  # elements read at once: bounds the temporary of abs() to 16 MiB
WORDS = {
    "exp_avg": "momentum exp_avg",
    "momentum_buffer": "momentum_buffer",
    "exp_avg_sq": "second moment exp_avg_sq",
    "param": "master weight",
    "weight": "weight",
}
"""Each tensor of the training state in words, in the order in which a fault spreads: from the state to the weights."""
_ORDER = list(WORDS)


@dataclass(frozen=True)
class Damage:
    """A tensor with elements that are NaN or infinite.

    Attributes:
        key: the tensor's key in `WORDS`.
        name: the parameter's name in the whole model.
        index: flat index of the first such element in its rank's part of the parameter.
        count: number of such elements in this rank's slice.
        rank: the rank that found it.
    """

    key: str
    name: str
    index: int
    count: int
    rank: int

    def __str__(self) -> str:
        return f"{WORDS[self.key]} of {self.name}[{self.index}]"


def is_nonfinite(flat: torch.Tensor) -> torch.Tensor:
    """Returns whether any element of a flat tensor is NaN or infinite (bool scalar on its device, no wait for it)."""
    # The largest magnitude is finite only if every element is: amax propagates NaN.
    found = torch.zeros((), dtype=torch.bool, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        found |= ~torch.isfinite(flat[start : start + _CHUNK].detach().abs().amax())
    return found


def damage_of(key: str, name: str, flat: torch.Tensor, start: int) -> Damage:
    """Describes a tensor for which `is_nonfinite` is true.

    Args:
        key, name: as in `Damage`.
        flat: this rank's slice [N].
        start: flat index of the slice's first element in this rank's part of the parameter.
    """
    bad = ~torch.isfinite(flat.detach())
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Damage(key, name, start + int(bad.nonzero()[0]), int(bad.sum()), rank)


@torch.no_grad()
def local_damage(model: list[Any], optimizer: TrainOptimizer) -> list[Damage]:
    """Returns the tensors of this rank that are not finite: its weights, replicas included, master weights and state.

    LION's momentum before its first gradient is left out: with init_exp_avg first_gradient it is NaN, "not begun".
    """
    inner = optimizer.inner
    not_begun = isinstance(inner, Lion) and inner.init_exp_avg == "first_gradient" and optimizer.num_steps == 0
    tensors: list[tuple[str, str, torch.Tensor, int]] = []
    for shard in local_shards(model, optimizer, replicas=True):
        for key, flat in {**({} if not_begun else shard.state), "param": shard.main}.items():
            tensors.append((key, shard.name, flat, shard.start))
    for chunk in model:
        for name, parameter in named_global_parameters(chunk):
            tensors.append(("weight", name, parameter.data.view(-1), 0))
    if not tensors:
        return []
    flags = torch.stack([is_nonfinite(flat) for _, _, flat, _ in tensors]).tolist()  # one wait for the device
    return [damage_of(*tensor) for tensor, bad in zip(tensors, flags, strict=True) if bad]


def gather_damage(local: Sequence[Damage]) -> list[Damage]:
    """Returns the damage of all ranks, the probable origin first; a collective call.

    A damaged momentum damages its weight in the next step and nothing else, because the gate skips the steps after that.
    """
    found: list[list[Damage]] = [list(local)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(local))
    return sorted((item for items in found for item in items), key=lambda item: _ORDER.index(item.key))


def describe_damage(damage: Sequence[Damage]) -> str:
    """Describes in words what `gather_damage` returned; it must not be empty.

    >>> describe_damage([Damage("exp_avg", "linear_fc2.weight", 7, 1, 0), Damage("weight", "linear_fc2.weight", 7, 1, 0)])
    'the momentum exp_avg of linear_fc2.weight[7] on rank 0 is NaN or infinite, and so is 1 other tensor'
    """
    first, rest = damage[0], len(damage) - 1
    several = f" (with {first.count:,} such elements)" if first.count > 1 else ""
    others = f", and so {'is 1 other tensor' if rest == 1 else f'are {rest:,} other tensors'}" if rest else ""
    return f"the {first}{several} on rank {first.rank} is NaN or infinite{others}"


def nonfinite_gradients(model: list[Any]) -> list[str]:
    """Returns "name[index]" of each parameter whose gradient buffer on this rank is not finite.

    index is the flat index of the first such element in this rank's part of the parameter.
    """
    found = []
    for chunk in model:
        for name, parameter in named_global_parameters(chunk):
            grad = getattr(parameter, "main_grad", None)
            if grad is not None and bool(is_nonfinite(grad.view(-1))):
                found.append(f"{name}[{damage_of('weight', name, grad.view(-1), 0).index}]")
    return found
