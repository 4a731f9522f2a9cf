"""The sums of fingerprints: torch, C++ and Triton give the integers of the formula, however a tensor is cut."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lion_cases import DEVICE, HAS_COMPILER
from properties import examples

from megatron_lion.optim import bit_sums, cpp_compiler
from megatron_lion.optim.bit_sum_kernel import BLOCK, kernel_sum
from megatron_lion.optim.bit_sums import Placement, bit_sum

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
ONES = (1 << 64) - 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ["torch", "triton", *(["cpp"] if HAS_COMPILER else [])]
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


def signed(number: int, width: int = 64) -> int:
    number &= (1 << width) - 1
    return number - (1 << width) if number >> (width - 1) else number


def expected(bits: list[int], dtype: torch.dtype, start: int, place: Placement, salt: int) -> list[int]:
    """The formula in Python's integers, and IEEE's and bfloat16's definition of NaN and infinity."""
    width, exponent = {
        torch.float32: (32, 0xFF << 23),
        torch.bfloat16: (16, 0xFF << 7),
        torch.float16: (16, 0x1F << 10),
    }[dtype]
    total = bad = 0
    for number, element in enumerate(bits):
        row, column = divmod(start + number, place.columns)
        index = place.first + row * place.whole_columns + column
        mixed = signed((signed(element, width) ^ salt) * 0x9E3779B97F4A7C15)
        mixed = signed((mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9)
        total += (mixed ^ (mixed >> 29)) * (2 * index + 1)
        bad += element & exponent == exponent
    return [signed(total), bad]


def as_tensor(bits: list[int], dtype: torch.dtype) -> torch.Tensor:
    width, whole = (32, torch.int32) if dtype == torch.float32 else (16, torch.int16)
    return torch.tensor([signed(element, width) for element in bits], dtype=whole).view(dtype)


def sum_of(
    way: str, flat: torch.Tensor, start: int, place: Placement, salt: int, remainder: torch.Tensor | None = None
) -> list[int]:
    """The sum that one of the ways computes; the kernel is interpreted on a CPU and compiled on CUDA."""
    if way == "triton":
        found = kernel_sum(flat.contiguous().to(DEVICE), start, place, salt, bit_sums.EXPONENTS[flat.dtype])
        return [int(value) for value in found]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_sums, "_cpp_pays", lambda numel: way == "cpp")
        return [int(value) for value in bit_sum(flat, start, place, salt, remainder=remainder)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], torch.dtype, int, Placement, int]:
    dtype = draw(st.sampled_from(DTYPES))
    top = 2**32 - 1 if dtype == torch.float32 else 2**16 - 1
    exponent = bit_sums.EXPONENTS[dtype]
    element = st.integers(0, top) | st.sampled_from([0, top, exponent, exponent - 1, exponent + 1, top // 2 + 1])
    bits = draw(st.lists(element, max_size=40))
    columns = draw(st.integers(1, 9) | st.just(2**33))
    parts = draw(st.integers(1, 4))
    first = draw(st.integers(0, 2**40))
    start = draw(st.integers(0, 50) | st.just(2**32 + 3))
    salt = draw(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -1]))
    return bits, dtype, start, Placement(columns, columns * parts, first), salt


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_formula(way: str) -> None:
    @examples(30 if way == "triton" else 150)
    @given(cases(), st.integers(1, 3))
    def check(case: tuple[list[int], torch.dtype, int, Placement, int], stride: int) -> None:
        bits, dtype, *where = case
        apart = as_tensor([element for element in bits for _ in range(stride)], dtype)
        flat = apart[::stride] if bits else apart
        assert sum_of(way, flat, *where) == expected(bits, dtype, *where)

    check()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "triton"])
@pytest.mark.parametrize(("form", "shift", "whole"), [("split32", 0, torch.int16), ("split24", 8, torch.int8)])
def test_split_master_weights_have_the_sum_of_the_joined_ones(
    way: str, form: str, shift: int, whole: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any two halves, also those that no split makes; the carry of a negative remainder reaches the upper half."""
    monkeypatch.setattr(bit_sums, "CHUNK", 8)
    half = 1 << (15 - shift)

    @examples(150)
    @given(
        st.lists(
            st.tuples(st.integers(0, 2**16 - 1) | st.sampled_from([0x7F80, 0xFF80, 0]), st.integers(-half, half - 1)),
            max_size=30,
        ),
        st.integers(0, 9),
    )
    def check(pairs: list[tuple[int, int]], start: int) -> None:
        joined = [((upper << 16) + (lower << shift)) & 0xFFFFFFFF for upper, lower in pairs]
        flat = as_tensor([upper for upper, _ in pairs], torch.bfloat16)
        remainder = torch.tensor([lower for _, lower in pairs], dtype=whole)
        where = start, Placement(3, 6, 3), 77
        assert sum_of(way, flat, *where, remainder) == expected(joined, torch.float32, *where)

    check()


# From the formula in Python's integers. Checkpoints hold sums of such numbers, so they may never change.
KNOWN = [
    (torch.float32, Placement(7, 7, 0), 0, 3, [8342449558531522865, 0]),
    (torch.float32, Placement(4, 12, 8), 3, -(2**63), [-6677216692672834120, 3]),
    (torch.bfloat16, Placement(21, 21, 1000), 2, 2**62 + 1, [5487527141170065751, 2]),
    (torch.bfloat16, Placement(5, 10, 5), 0, -7, [288934136039702048, 0]),
    (torch.float16, Placement(1, 2, 1), 1, -1, [4748990056624258820, 1]),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "place", "start", "salt", "known"), KNOWN, ids=range(len(KNOWN)))
def test_known_values(way: str, dtype: torch.dtype, place: Placement, start: int, salt: int, known: list[int]) -> None:
    flat = (torch.arange(-10, 11) / 4).to(dtype)  # exact in every dtype
    flat[:start] = float("nan")
    bits = flat.view(torch.int32 if dtype == torch.float32 else torch.int16).tolist()
    assert expected(bits, dtype, start, place, salt) == known
    assert sum_of(way, flat, start, place, salt) == known


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numel", [BLOCK - 1, BLOCK, 2 * BLOCK + 1, 3 * 2**17 + 5])
def test_threads_blocks_and_chunks_leave_no_seam(way: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around a program's block, and enough elements for three threads; also across rows of a part."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(bit_sums, "CHUNK", 2**17)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    values[[0, numel // 3, numel - 1]] = float("inf")
    for place in (Placement(1000, 1000, 0), Placement(1000, 3000, 2000)):
        whole = bit_sums.reference_sum(values, 17, place, 5)
        assert sum_of(way, values, 17, place, 5) == whole.tolist()
        assert whole[1] == 3


@needs_compiler
def test_the_library_is_built_for_large_tensors_and_used_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    place = Placement(1, 1, 0)
    monkeypatch.setattr(bit_sums, "_add_in_cpp", lambda result, flat, *_: taken.append(flat.numel()))
    for is_there, numel, whole in ((False, 10, 0), (False, 99, 100), (False, 100, 0), (True, 1, 0), (True, 0, 0)):
        monkeypatch.setattr(bit_sums, "CPP_PAYS", 100)
        monkeypatch.setattr(bit_sums.library, "is_built", lambda is_there=is_there: is_there)
        bit_sum(torch.zeros(numel), 0, place, 1, whole_numel=whole)
    assert taken == [99, 100, 1, 0]


@needs_compiler
def test_is_built_once_the_library_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cpp_compiler.is_kept(bit_sums.SOURCE)
    cpp_compiler.build_library(bit_sums.SOURCE)
    assert cpp_compiler.is_kept(bit_sums.SOURCE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not cpp_compiler.is_kept(bit_sums.SOURCE)


@pytest.fixture
def no_memory_of_builds():
    """Clears what the process has cached about the library, before and after the test."""
    bit_sums.library.forget()
    yield
    bit_sums.library.forget()


@pytest.mark.parametrize("broken", ["no compiler", "other integers"])
def test_without_a_library_that_works_torch_sums(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_memory_of_builds: None,
) -> None:
    if broken == "no compiler":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:

        class Wrong:
            @staticmethod
            def bit_sum(work: ctypes.Structure) -> None:
                """Leaves the sum at 0."""

        monkeypatch.setattr(cpp_compiler, "build_library", lambda name: Wrong)
    monkeypatch.setattr(bit_sums, "CPP_PAYS", 1)
    flat, place = torch.linspace(-1, 1, 50), Placement(5, 10, 5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(bit_sum(flat, 3, place, 9), bit_sums.reference_sum(flat, 3, place, 9))
    lines = [record.getMessage() for record in caplog.records if record.name == bit_sums.__name__]
    assert len(lines) == 1
    assert "slower: " in lines[0]


@needs_compiler
def test_no_offset_is_cut_to_32_bits(tmp_path: Path) -> None:
    """The compiler reports every implicit narrowing, so tensors of 2^31 elements and more have 64-bit offsets throughout."""
    strict = ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion", "-Werror"]
    source = Path(cpp_compiler.__file__).with_name(bit_sums.SOURCE)
    command = [*cpp_compiler._compiler(), *cpp_compiler.FLAGS, *strict, str(source), "-o", str(tmp_path / "strict.so")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
