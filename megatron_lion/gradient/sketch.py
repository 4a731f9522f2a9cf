"""A linear sketch of the gradient: a constant number of values that keeps ‖·‖₂, inner products and, sampled, ‖·‖₁.

Gradient buffers hold one running sum. To know how batches scatter, sums over single batches are needed, and a copy of
the gradient for each would take 4 bytes per parameter. Both parts of the sketch are linear, so the sketch of a batch's
gradient is the difference of two sketches of the buffers, and sketches of ranks, stages and copies add up:

- *buckets* z [M]: each coordinate is added to one bucket with a random sign. E‖z‖² = ‖g‖² and E⟨z_a, z_b⟩ = ⟨a, b⟩, with
  a relative standard deviation of at most 2/√M (0.55 % for M = 2^17) for any gradient, and of √(2/M) unless its blocks of
  M coordinates are alike. A sample of coordinates has no such bound: if the energy is in few embedding rows, it was off
  by 16 % at 4 % of the coordinates.
- *coordinates* c [C]: values at fixed places, one in each of equal intervals of every tensor, for ‖·‖₁, which no linear
  map of constant size keeps. ‖·‖₁ is far less concentrated than ‖·‖₂².

A model of at most M (or C) parameters is kept whole; its norms are then exact.

Signs, buckets and places depend on a coordinate's place in the whole model, not on the layout, so the same gradient has
the same sketch under data, tensor, pipeline and sequence parallelism, up to the rounding of fp32 sums.

Source: Alon, Matias, Szegedy, "The space complexity of approximating the frequency moments" (1996); Charikar, Chen,
Farach-Colton, "Finding frequent items in data streams" (2002).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lion.optim.parameter_shards import named_global_parameters

BUCKETS = 1 << 17
COORDINATES = 1 << 17
"""Together 1 MiB per vector in fp32."""

_AT_LEAST = 256  # sampled coordinates per tensor: norms and biases are small and contain much of the gradient


@dataclass(frozen=True)
class _Piece:
    """A run of coordinates of one local tensor that go to consecutive buckets."""

    tensor: int
    start: int
    bucket: int
    sign_from: int
    length: int
    sign: float


class GradientSketch:
    """The linear map from this rank's gradient buffers to a vector [M + C]; the sum over all ranks is the sketch.

    Args:
        model: DDP-wrapped chunks; building the sketch is a collective call.
        buckets: M; all coordinates have their own bucket if the model has no more.
        coordinates: about C, at least 256 of every tensor; all if the model has no more.

    Attributes:
        num_parameters: d of the whole model; tied tensors count once.
        num_buckets: M.
        weights_C: number of coordinates that each sampled one represents, fp32 [C].
        names: names of the tensors, in the order of their sampled coordinates.
        sampled_counts: number of sampled coordinates of each tensor.
        is_exact: whether every coordinate has its own bucket.
    """

    def __init__(self, model: list[Any], buckets: int = BUCKETS, coordinates: int = COORDINATES) -> None:
        entries = [(name, parameter) for chunk in model for name, parameter in named_global_parameters(chunk)]
        self._device = entries[0][1].device
        sizes = _whole_sizes(entries)
        self.num_parameters = sum(sizes.values())
        self.is_exact = self.num_parameters <= buckets
        self.num_buckets = self.num_parameters if self.is_exact else buckets
        generator = torch.Generator().manual_seed(0)
        signs_M = torch.randint(0, 2, (self.num_buckets,), generator=generator) * 2.0 - 1.0
        self._signs_M = signs_M.to(self._device)
        counts = _sample_sizes(sizes, coordinates)
        self.names, self.sampled_counts = tuple(counts), tuple(counts.values())
        weights = [torch.full((counts[name],), size / counts[name]) for name, size in sizes.items()]
        self.weights_C = torch.cat(weights).to(self._device)
        first_bucket, first_sampled = _starts(sizes), _starts(counts)
        self._tensors: list[tuple[Any, bool]] = []
        self._pieces: list[_Piece] = []
        self._sampled: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        for name, parameter in entries:
            if not _contributes(model[0].config, parameter):
                continue
            turned, start = _is_turned(parameter), _start_in_whole(parameter)
            number = len(self._tensors)
            self._tensors.append((parameter, turned))
            if self.is_exact:
                bucket = first_bucket[name] + start
                self._pieces.append(_Piece(number, 0, bucket, bucket, parameter.numel(), 1.0))
            else:
                self._pieces += _hashed_pieces(name, number, start, parameter.numel(), buckets)
            places = _spread(sizes[name], counts[name], name)
            here = (places >= start) & (places < start + parameter.numel())
            own = places[here] - start
            if turned:  # from the transposed order to the order in memory
                rows, columns = parameter.shape
                own = (own % rows) * columns + own // rows
            into = torch.nonzero(here).view(-1) + first_sampled[name]
            self._sampled.append((parameter, own.to(self._device), into.to(self._device)))
        if self.is_exact:
            self._signs_M.fill_(1.0)

    @property
    def size(self) -> int:
        """Length M + C of a vector."""
        return self.num_buckets + self.weights_C.numel()

    @property
    def relative_error(self) -> float:
        """Bound on the relative standard deviation of ‖z‖² about ‖g‖², over the random signs; 0 if exact."""
        return 0.0 if self.is_exact else 2.0 / math.sqrt(self.num_buckets)

    @torch.no_grad()
    def local(self) -> torch.Tensor:
        """Returns this rank's part of the sketch of the gradient buffers, fp32 [M + C]."""
        vector = torch.zeros(self.size, device=self._device)
        buckets_M, sampled_C = vector.split([self.num_buckets, self.weights_C.numel()])
        flat, at = torch.zeros(0), -1
        for piece in self._pieces:
            if piece.tensor != at:
                at = piece.tensor
                parameter, turned = self._tensors[at]
                flat = parameter.main_grad.t().reshape(-1) if turned else parameter.main_grad.view(-1)
            buckets_M[piece.bucket : piece.bucket + piece.length].addcmul_(
                flat[piece.start : piece.start + piece.length],
                self._signs_M[piece.sign_from : piece.sign_from + piece.length],
                value=piece.sign,
            )
        for parameter, own, into in self._sampled:
            # index_add_: the two copies of a tied embedding may be on one rank, in two chunks of the model.
            sampled_C.index_add_(0, into, parameter.main_grad.view(-1).index_select(0, own))
        return vector

    def squares(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the estimate of ‖g‖₂² of a summed vector, float64 scalar."""
        return vector[: self.num_buckets].double().square().sum()

    def l1(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the estimate of ‖g‖₁ of a summed vector, float64 scalar."""
        return (self.sampled(vector).abs() * self.weights_C).sum(dtype=torch.float64)

    def sampled(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the sampled coordinates of a vector, fp32 [C], a view."""
        return vector[self.num_buckets :]


def _contributes(settings: Any, parameter: torch.nn.Parameter) -> bool:
    """Whether this rank's buffer of a parameter is a term of the sum over all ranks.

    Tensor-parallel copies have the same gradient and one of them counts, except under sequence parallelism: then each
    copy has the gradient of its part of the sequence. Both copies of a tied embedding have their stage's part.
    """
    if getattr(parameter, "tensor_model_parallel", False):
        return True
    if settings.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _whole_sizes(entries: list[tuple[str, torch.nn.Parameter]]) -> dict[str, int]:
    """Returns the number of coordinates of each tensor of the whole model by name, in one order on all ranks; collective."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    own = {
        name: parameter.numel() * (tp_size if getattr(parameter, "tensor_model_parallel", False) else 1)
        for name, parameter in entries
    }
    parts: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    sizes: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            assert sizes.setdefault(name, size) == size, f"{name}: {size} and {sizes[name]} coordinates on two ranks"
    return dict(sorted(sizes.items()))


def _is_turned(parameter: torch.nn.Parameter) -> bool:
    """Whether a matrix is split along its columns; transposed, each rank's part is one run of the whole matrix."""
    return parameter.dim() == 2 and getattr(parameter, "partition_dim", -1) == 1


def _start_in_whole(parameter: torch.nn.Parameter) -> int:
    """Place of the local tensor's first coordinate in the whole tensor, transposed if `_is_turned`."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.numel() * parallel_state.get_tensor_model_parallel_rank() if split else 0


def _starts(sizes: dict[str, int]) -> dict[str, int]:
    starts, place = {}, 0
    for name, size in sizes.items():
        starts[name] = place
        place += size
    return starts


def _sample_sizes(sizes: dict[str, int], coordinates: int) -> dict[str, int]:
    """Sampled coordinates of each tensor: in proportion to its size in the whole model, at least 256."""
    total = sum(sizes.values())
    if total <= coordinates:
        return dict(sizes)
    return {name: min(size, _AT_LEAST + coordinates * size // total) for name, size in sizes.items()}


def _hashed_pieces(name: str, tensor: int, start: int, numel: int, buckets: int) -> list[_Piece]:
    """Pieces of coordinates start … start + numel of a whole tensor.

    Coordinate i is in block b = i // M. Block b has a random sign and is rotated by a random offset before it is added to
    the buckets, with one vector of M random signs for all blocks. Two coordinates meet only if they are in different
    blocks; the expectation of their product is then 0 because of the blocks' signs. Products of different pairs are
    uncorrelated because of the vector's signs, except those of two blocks a and b with the same offset (probability 1/M):
    they add up to ⟨a, b⟩. This adds ⟨a, b⟩²/M ≤ ‖a‖²‖b‖²/M to a variance that is ‖a‖²‖b‖²/M for independent signs, so the
    variance is at most twice as large.
    """
    pieces = []
    place = start
    while place < start + numel:
        block, within = divmod(place, buckets)
        length = min(buckets - within, start + numel - place)
        word = hashlib.sha256(f"{name}:{block}".encode()).digest()
        offset, sign = int.from_bytes(word[:8], "little") % buckets, 1.0 if word[8] & 1 else -1.0
        bucket = (within + offset) % buckets
        first = min(length, buckets - bucket)  # the rest continues at bucket 0
        pieces.append(_Piece(tensor, place - start, bucket, within, first, sign))
        if first < length:
            pieces.append(_Piece(tensor, place - start + first, 0, within + first, length - first, sign))
        place += length
    return pieces


def _spread(numel: int, count: int, key: str) -> torch.Tensor:
    """Returns `count` of `numel` indices, int64: one in each of `count` equal intervals, at positions that depend on `key`."""
    if count == numel:
        return torch.arange(numel)
    # A CPU generator gives the same indices on every device. float64, because float32 is exact only up to 2^24.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = ((torch.arange(count, dtype=torch.float64) + places) * (numel / count)).long()
    return index.clamp_(max=numel - 1)
