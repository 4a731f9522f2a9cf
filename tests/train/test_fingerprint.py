"""The fingerprint equals its formula in Python integers, and every kind of change alters it."""

from __future__ import annotations

import hashlib

import pytest
import torch
from megatron.core import parallel_state

from megatron_lion.optim import bit_sums
from megatron_lion.optim.bit_sums import bit_sum
from megatron_lion.optim.parameter_shards import Shard
from megatron_lion.train import fingerprint

ONES = (1 << 64) - 1
NAMES = ("decoder.weight", "embedding.weight")


class Place:
    """This process's tensor-parallel rank and size, as the fingerprint reads them from megatron-core."""

    rank, size = 0, 1


@pytest.fixture(autouse=True, params=["torch", "cpp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in torch, in chunks, and in the C++ library."""
    if request.param == "cpp" and bit_sums.library.why_not() is not None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(bit_sums, "_cpp_pays", lambda numel: request.param == "cpp")


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place()
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: place.rank)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: place.size)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    return place


def expected_sum(salt_name: str, values: torch.Tensor) -> int:
    """Σ mix(bits) · (2 · index + 1) mod 2^64 over a whole tensor, with Python's integers.

    mix multiplies by two odd constants (Fibonacci hashing's and splitmix64's) and xors the upper bits into the lower
    ones after each, with arithmetic shifts.
    """

    def signed(number: int) -> int:
        number &= ONES
        return number - (1 << 64) if number >> 63 else number

    salt = signed(int.from_bytes(hashlib.sha256(salt_name.encode()).digest()[:8], "little"))
    bits = values.flatten().view(torch.int16 if values.element_size() == 2 else torch.int32).tolist()
    total = 0
    for index, element in enumerate(bits):
        mixed = signed((element ^ salt) * 0x9E3779B97F4A7C15)
        mixed = signed((mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9)
        total += (mixed ^ (mixed >> 29)) * (2 * index + 1)
    return total & ONES


def as_text(total: int) -> str:
    number = total & ONES
    number = number - (1 << 64) if number >> 63 else number
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def state() -> dict[str, torch.Tensor]:
    """Two tensors of one shape, with a momentum each; the first element of each tensor is +0.0."""
    values = torch.randn(4, 21, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 0.0
    keys = [f"{name}:{key}" for name in NAMES for key in ("param", "exp_avg")]
    return dict(zip(keys, values, strict=True))


def found(tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the fingerprint of a state made by `state`."""
    shards = []
    for name in NAMES:
        main, momentum = tensors[f"{name}:param"], tensors[f"{name}:exp_avg"]
        shards.append(Shard(name, torch.nn.Parameter(main), 0, main, None, {"exp_avg": momentum}, 0.0))
    monkeypatch.setattr(fingerprint, "local_shards", lambda model, optimizer, split: iter(shards))
    return fingerprint.state_fingerprint([torch.nn.Linear(1, 1)], None)


def test_state_fingerprint_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    expected = as_text(sum(expected_sum(name, values) for name, values in tensors.items()))
    assert found(tensors, monkeypatch) == expected
    for chunk in (1, 8, 20, 21, 22):  # splitting a tensor of 21 elements does not change the sum
        monkeypatch.setattr(bit_sums, "CHUNK", chunk)
        assert found(tensors, monkeypatch) == expected, chunk


def test_every_change_alters_the_state_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_sums, "CHUNK", 8)  # elements 7 and 8, 15 and 16 are next to a boundary
    before = state()
    seen = {found(before, monkeypatch): "nothing"}

    def differs(after: dict[str, torch.Tensor], what: str) -> None:
        value = found(after, monkeypatch)
        assert value not in seen, f"{what} has the fingerprint of {seen[value]}"
        seen[value] = what

    for key, values in before.items():
        for index in (0, 7, 8, 15, 16, 20):
            changed = values.clone()
            changed.view(torch.int32)[index] ^= 1
            differs({**before, key: changed}, f"last bit of {key}[{index}]")
        negative = values.clone()
        negative[0] = -0.0
        assert torch.equal(negative, values), "the case is about the sign of zero"
        differs({**before, key: negative}, f"sign of {key}[0]")
        for one, other in ((0, 1), (7, 8), (1, 9), (3, 19)):  # neighbours, across a boundary, same offset in two chunks
            swapped = values.clone()
            swapped[[one, other]] = values[[other, one]]
            differs({**before, key: swapped}, f"{key}[{one}] and [{other}] swapped")
        differs({**before, key: values.flip(0)}, f"{key} reversed")
    first, second = NAMES
    for one, other in (
        (f"{first}:param", f"{second}:param"), (f"{first}:exp_avg", f"{second}:exp_avg"), (f"{first}:param", f"{first}:exp_avg"),
    ):  # fmt: skip
        differs({**before, one: before[other], other: before[one]}, f"{one} and {other} swapped")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_fingerprint_is_the_formula(dtype: torch.dtype) -> None:
    chunks = [torch.nn.Linear(5, 3, dtype=dtype), torch.nn.Linear(2, 4, bias=False, dtype=dtype)]
    model = torch.nn.ModuleDict({"one": chunks[0], "two": chunks[1]})
    expected = sum(expected_sum(name, parameter.detach()) for name, parameter in model.named_parameters())
    assert fingerprint.weights_fingerprint([model]) == as_text(expected)
    with torch.no_grad():
        chunks[0].bias.view(-1)[2] = -chunks[0].bias[2]
    assert fingerprint.weights_fingerprint([model]) != as_text(expected)


def test_parts_of_a_tensor_add_up_to_the_whole(place: Place) -> None:
    """Slices of a tensor (data parallel), rows, columns and vectors (tensor parallel)."""
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    expected = expected_sum("weight", whole)
    salt = fingerprint._salt("weight")

    def sums(parts: list[torch.Tensor], **attributes: int | bool) -> int:
        total = 0
        place.size = len(parts)
        for place.rank, part in enumerate(parts):
            parameter = torch.nn.Parameter(part.contiguous())
            for name, value in attributes.items():
                setattr(parameter, name, value)
            where = fingerprint._placement(parameter)
            for start, end in ((0, 5), (5, part.numel())):
                total += int(bit_sum(parameter.view(-1)[start:end], start, where, salt)[0])
        return total & ONES

    assert sums([whole]) == expected
    assert sums(list(whole.chunk(2, dim=0)), tensor_model_parallel=True, partition_dim=0) == expected
    assert sums(list(whole.chunk(4, dim=1)), tensor_model_parallel=True, partition_dim=1) == expected
    bias = whole.flatten()
    assert sums(list(bias.chunk(3)), tensor_model_parallel=True, partition_dim=0) == expected_sum("weight", bias)
