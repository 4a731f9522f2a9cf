"""The fingerprint kernel's compiled code for A100 (sm_80) and H100/H200 (sm_90); no device is needed to compile and read it."""

from __future__ import annotations

import pytest
from compiled_kernels import run_compiling

pytestmark = pytest.mark.slow  # a minute of compiling; test_kernel_compiled.py holds the optimizer's kernels

COMPILE = r"""
import json, re, sys
import triton
from compiled_kernels import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lion.optim.bit_sum_kernel import BLOCK, NUM_WARPS, bit_sum_kernel

found = []
for capability, bits, number, is_part in json.loads(sys.argv[1]):
    fixed = {"IS_PART": is_part, "BLOCK": BLOCK}
    numbers = dict.fromkeys(("numel", "start", "columns", "whole_columns", "first", "salt"), number)
    source = ASTSource(
        fn=bit_sum_kernel,
        signature={"bits": bits, "result": "*i64", **numbers, "exponent": "i32", **dict.fromkeys(fixed, "constexpr")},
        constexprs={(bit_sum_kernel.arg_names.index(name),): value for name, value in fixed.items()},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    text = kernel.asm["ptx"]
    found.append({
        "added": re.findall(r"(?:atom|red)\S*\.add\.\w+", text),
        **usage_of(kernel),
    })
sys.stdout.write(json.dumps(found))
"""

# Capability, stored bits, type of the numbers (Triton passes small ones in 32 bits), part of the columns of a tensor.
CASES = [
    (80, "*i32", "i32", False), (90, "*i32", "i32", False), (90, "*i16", "i64", False), (80, "*i16", "i32", True),
    (90, "*i32", "i64", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int | list[str]]]:
    return run_compiling(COMPILE, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_kernel_adds_64_bits_and_spills_nothing(compiled: list[dict[str, int | list[str]]], index: int) -> None:
    kernel = compiled[index]
    assert len(kernel["added"]) == 2
    assert all(kind.endswith(("64", "b64")) for kind in kernel["added"])
    assert kernel["stack"] == 0
    # An SM has 65,536 registers and at most 2,048 threads: with 64 registers it holds 1,024 of them.
    assert kernel["registers"] <= 64
    assert kernel["shared"] <= 1024
