"""Hash of weights and optimizer state that is the same at every parallel layout.

Every element contributes mix(bits) · (2 · global index + 1) mod 2^64 to its tensor's sum. Sums over shards therefore
add up to the same number at any data-, tensor- or pipeline-parallel size. Two states with equal fingerprints are equal
bit for bit, except with a probability of about 2^-64. The hash detects faults; file digests detect manipulation.

The same pass refuses a state that holds a NaN or an infinity: it has no fingerprint, so it is neither saved nor resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megatron_lion.errors import NumericsError
from megatron_lion.optim.bit_sums import Placement, bit_sum
from megatron_lion.optim.nonfinite import damage_of, describe_damage, gather_damage
from megatron_lion.optim.parameter_shards import counts_here, local_shards, named_global_parameters
from megatron_lion.optim.precision import join_master
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.parallel import all_reduce_sum


class _Part(NamedTuple):
    """A slice of a tensor that this rank accounts for; key and name are those of `Damage`, the rest that of `bit_sum`."""

    key: str
    name: str
    flat: torch.Tensor
    start: int
    place: Placement
    salt: int
    remainder: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """Returns the slice's numbers, of which `flat` may be the upper halves."""
        return self.flat if self.remainder is None else join_master(self.flat, self.remainder)


def _placement(parameter: torch.nn.Parameter) -> Placement:
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    columns = parameter.shape[-1] if parameter.dim() else 1
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return Placement(columns, columns, 0)
    if parameter.dim() > 1 and getattr(parameter, "partition_dim", 0) == parameter.dim() - 1:
        return Placement(columns, columns * size, rank * columns)
    return Placement(columns, columns, rank * parameter.numel())


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

    def parts() -> Iterator[_Part]:
        for shard in local_shards(model, optimizer, split=True):
            place = _placement(shard.parameter)
            for key, flat in {"param": shard.main, **shard.state}.items():
                remainder = shard.remainder if key == "param" else None
                yield _Part(key, shard.name, flat, shard.start, place, _salt(f"{shard.name}:{key}"), remainder)

    return _over_all_ranks(parts, model)


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

    def parts() -> Iterator[_Part]:
        # Data ranks hold copies of the same weights: each weight counts once.
        if parallel_state.get_data_parallel_rank() != 0:
            return
        for chunk in model:
            for name, parameter in named_global_parameters(chunk):
                if counts_here(parameter):
                    flat = (parameter.data if values is None else values[parameter]).reshape(-1)
                    yield _Part("weight", name, flat, 0, _placement(parameter), _salt(name))

    return _over_all_ranks(parts, model)


def _salt(name: str) -> int:
    # Depends on the tensor's name, so two swapped tensors change the fingerprint.
    return _signed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _over_all_ranks(parts: Callable[[], Iterator[_Part]], model: list[Any]) -> str:
    """Returns the fingerprint of the parts of all ranks; `parts` is called again if one of them is not finite."""
    device = next(model[0].parameters()).device
    numel = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    # Each part is dropped before the next one is made, since packed momentum is unpacked for it.
    sums = [
        bit_sum(part.flat, part.start, part.place, part.salt, remainder=part.remainder, whole_numel=numel)
        for part in parts()
    ]
    own = torch.stack(sums).tolist() if sums else []  # the host waits for the device once, not for each tensor
    box = torch.tensor(
        [_signed(sum(total for total, _ in own)), sum(bad for _, bad in own)], dtype=torch.int64, device=device
    )
    summed, damaged = all_reduce_sum(box).tolist()
    if damaged:
        damage = [
            damage_of(part.key, part.name, part.values(), part.start)
            for part, (_, bad) in zip(parts(), own, strict=True)
            if bad
        ]
        raise NumericsError(describe_damage(gather_damage(damage)))
    return hashlib.sha256(str(summed).encode()).hexdigest()[:32]
