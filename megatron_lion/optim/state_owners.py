"""Master weights and optimizer state as whole tensors, for a fully_reshardable checkpoint; each is on one rank only.

DistributedOptimizer shards a buffer of all parameters, so a tensor may lie on several data-parallel ranks. In a save the
rank with the largest part of a tensor owns it: it receives the rest and writes the whole. So every rank holds and writes
about its own shard. When loading, a rank reads only the tensors of which it holds a part.

mcore 0.19.2: its own way gathers all tensors on every rank, of which only the first writes them, and reads all tensors on
every rank; and it drops the padding at bucket ends while it slices by offsets that include it, which shifts the state
of a model with padded buckets. Remove this file when it does neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class _Spread(NamedTuple):
    """A parameter, and the number of its elements on each data-parallel rank, in the order of the elements."""

    number: int
    parameter: torch.nn.Parameter
    counts: list[int]


def states_to_save(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> dict[int, dict[str, ShardedTensor]]:
    """Returns the whole tensors that this rank owns, on the host, by the parameter's number; a collective call.

    Args:
        optimizer: the optimizer of the parameters.
        model_state: their ShardedTensors, whose data are the Parameter objects.
    """
    group = optimizer.data_parallel_group
    places = {item.data: item for item in model_state.values()}
    states: dict[int, dict[str, ShardedTensor]] = {}
    for number, parameter, counts in _spreads(optimizer):
        place = places[parameter]
        # Its last entry numbers the data-parallel ranks; the owner takes the place of the first.
        replica_id = (*place.replica_id[:-1], 0)
        if not is_main_replica(replica_id):  # tensor- or pipeline-parallel copies, which are not written
            continue
        owner = counts.index(max(counts))
        # mcore 0.19.2: no public method gives a parameter's slice and state; remove when one does.
        own = optimizer._get_main_param_and_optimizer_states(parameter) if counts[group.rank()] else {}
        for key in ("param", *optimizer.optimizer_state_keys):
            part = own[key].detach().view(-1) if own else None
            whole = _gathered(part, counts, owner, group) if max(counts) < sum(counts) else part
            if owner == group.rank() and whole is not None:
                data = whole.cpu().view(place.data.shape)
                states.setdefault(number, {})[key] = _sharded(place, key, data, replica_id)
    return states


def states_to_load(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> dict[int, dict[str, ShardedTensor]]:
    """Returns empty whole tensors, on the host, for the parameters of which this rank holds a part; arguments as above."""
    rank = optimizer.data_parallel_group.rank()
    places = {item.data: item for item in model_state.values()}
    return {
        number: {
            key: _sharded(
                places[parameter], key, torch.empty(parameter.shape, dtype=torch.float32), places[parameter].replica_id
            )
            for key in ("param", *optimizer.optimizer_state_keys)
        }
        for number, parameter, counts in _spreads(optimizer)
        if counts[rank]
    }


def _spreads(optimizer: DistributedOptimizer) -> Iterator[_Spread]:
    """Yields all parameters, in the order in which megatron-core numbers them."""
    size, number = optimizer.data_parallel_group.size(), 0
    for buffer in optimizer.buffers:
        for parameter, (start, end, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            share = bucket.grad_data.numel() // size
            bounds = [bucket.offset + rank * share for rank in range(size + 1)]
            counts = [max(0, min(end, bounds[rank + 1]) - max(start, bounds[rank])) for rank in range(size)]
            yield _Spread(number, parameter, counts)
            number += 1


def _gathered(
    part: torch.Tensor | None, counts: list[int], owner: int, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Returns all parts one after the other on the owner, None on the other ranks; a collective call.

    All-to-all, since the parts differ in size, and ranks without one must take part in a collective of the group.
    """
    device = torch.cuda.current_device() if part is None else part.device
    own = torch.empty(0, dtype=torch.float32, device=device) if part is None else part
    is_owner = owner == group.rank()
    received = torch.empty(sum(counts) if is_owner else 0, dtype=torch.float32, device=device)
    sent = [own.numel() if rank == owner else 0 for rank in range(len(counts))]
    dist.all_to_all_single(received, own, counts if is_owner else [0] * len(counts), sent, group=group)
    return received if is_owner else None


def _sharded(place: ShardedTensor, key: str, data: torch.Tensor, replica_id: Any) -> ShardedTensor:
    name = f"optimizer.state.{key}.{place.key}"
    made = replace(place, key=name, data=data, dtype=data.dtype, replica_id=replica_id)
    made.validate_metadata_integrity()
    return made
