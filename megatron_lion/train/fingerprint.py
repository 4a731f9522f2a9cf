"""Hash of weights and optimizer state that is the same at every parallel layout.

Every element contributes mix(bits) · (2 · global index + 1) mod 2^64 to its tensor's sum. Sums over shards therefore
add up to the same number at any data-, tensor- or pipeline-parallel size. Two states with equal fingerprints are equal
bit for bit, except with a probability of about 2^-64. The hash detects faults; file digests detect manipulation.

The same pass refuses a state that holds a NaN or an infinity: it has no fingerprint, so it is neither saved nor resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_lion.errors import NumericsError
from megatron_lion.optim.nonfinite import Damage, damage_of, describe_damage, gather_damage, is_nonfinite
from megatron_lion.optim.parameter_shards import counts_here, local_shards, named_global_parameters
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import all_reduce_sum

_CHUNK = 1 << 22  # elements hashed at once: bounds each int64 temporary to 32 MiB
_MIX = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX2 = -4658895280553007687  # 0xBF58476D1CE4E5B9 as int64


@dataclass(frozen=True)
class _Placement:
    """Position of a tensor-parallel part in its whole tensor.

    Local flat index i has global flat index first + (i // columns) · whole_columns + i % columns.
    """

    columns: int
    whole_columns: int
    first: int


def _placement(parameter: torch.nn.Parameter) -> _Placement:
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    columns = parameter.shape[-1] if parameter.dim() else 1
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return _Placement(columns, columns, 0)
    if parameter.dim() > 1 and getattr(parameter, "partition_dim", 0) == parameter.dim() - 1:
        return _Placement(columns, columns * size, rank * columns)
    return _Placement(columns, columns, rank * parameter.numel())


def _tensor_sum(flat: torch.Tensor, start: int, place: _Placement, salt: int) -> int:
    """Sum of a slice's contributions; its element i is flat element start + i of the local tensor."""
    # int64 arithmetic wraps modulo 2^64, so addition is exact and its order (chunks, shards, ranks) does not matter.
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk_start in range(0, flat.numel(), _CHUNK):
        part = flat[chunk_start : chunk_start + _CHUNK].detach().contiguous()
        # Bits, not values: they distinguish -0.0 from 0.0 and one NaN from another.
        bits = part.view(torch.int32 if part.element_size() == 4 else torch.int16).to(torch.int64)
        local = torch.arange(part.numel(), dtype=torch.int64, device=flat.device) + (start + chunk_start)
        whole = (
            local
            if place.whole_columns == place.columns
            else (local // place.columns) * place.whole_columns + local % place.columns
        )
        mixed = (bits ^ salt) * _MIX
        mixed = (mixed ^ (mixed >> 31)) * _MIX2
        # The factor is odd, thus invertible modulo 2^64: it never cancels a difference between two mixed values. It
        # depends on the index, so swapped elements change the sum.
        total += ((mixed ^ (mixed >> 29)) * (2 * (whole + place.first) + 1)).sum()
    return int(total)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


@torch.no_grad()
def state_fingerprint(model: list[Any], optimizer: TrainOptimizer) -> str:
    """Hash of fp32 master weights and optimizer state; a collective call.

    Returns:
        32 hexadecimal digits, the same on every rank and at every layout.

    Raises:
        NumericsError: an element is NaN or infinite; names its tensor; on all ranks.
    """
    total = 0
    damage: list[Damage] = []
    for shard in local_shards(model, optimizer):
        placement = _placement(shard.parameter)
        for key, flat in {"param": shard.main, **shard.state}.items():
            total += _tensor_sum(flat, shard.start, placement, _salt(f"{shard.name}:{key}"))
            if is_nonfinite(flat):
                damage.append(damage_of(key, shard.name, flat, shard.start))
    return _over_all_ranks(total, damage, next(model[0].parameters()).device)


@torch.no_grad()
def weights_fingerprint(model: list[Any], values: Mapping[torch.nn.Parameter, torch.Tensor] | None = None) -> str:
    """Hash of the model's own weights, in the dtype of training (fp32, bf16 or fp16); a collective call.

    Args:
        model: DDP-wrapped chunks.
        values: tensors to hash in place of the parameters, in the same shapes; None hashes the parameters.

    Returns:
        32 hexadecimal digits, the same on every rank and at every layout.

    Raises:
        NumericsError: a weight is NaN or infinite; names it; on all ranks.
    """
    total = 0
    damage: list[Damage] = []
    # Data ranks hold copies of the same weights: each weight counts once.
    if parallel_state.get_data_parallel_rank() == 0:
        for chunk in model:
            for name, parameter in named_global_parameters(chunk):
                if counts_here(parameter):
                    flat = (parameter.data if values is None else values[parameter]).reshape(-1)
                    total += _tensor_sum(flat, 0, _placement(parameter), _salt(name))
                    if is_nonfinite(flat):
                        damage.append(damage_of("weight", name, flat, 0))
    return _over_all_ranks(total, damage, next(model[0].parameters()).device)


def _salt(name: str) -> int:
    # Depends on the tensor's name, so two swapped tensors change the fingerprint.
    return _signed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _over_all_ranks(total: int, damage: list[Damage], device: torch.device) -> str:
    box = torch.tensor([_signed(total), len(damage)], dtype=torch.int64, device=device)
    summed, damaged = all_reduce_sum(box).tolist()
    if damaged:
        raise NumericsError(describe_damage(gather_damage(damage)))
    return hashlib.sha256(str(summed).encode()).hexdigest()[:32]
