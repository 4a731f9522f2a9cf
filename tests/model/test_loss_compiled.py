"""The loss kernels' compiled code for A100 (sm_80) and H100/H200 (sm_90); no device is needed to compile and read it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from compiled_kernels import run_compiling

COMPILE = r"""
import json, re, sys
import triton
from compiled_kernels import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lion.model import loss_kernels

POINTERS = {"targets": "*i64", "statistics": "*fp32", "maxima": "*fp32", "sums": "*fp32", "upstream": "*fp32"}
found = []
for capability, name, kind, aligned in json.loads(sys.argv[1]):
    kernel = getattr(loss_kernels, name)
    kinds = {**POINTERS, "logits": "*" + kind, "num_rows": "i32", "width": "i32", "BLOCK": "constexpr"}
    names = kernel.arg_names
    # Triton finds out at each launch which addresses and numbers are multiples of 16.
    even = [index for index, name in enumerate(names) if name == "logits" or (name == "width" and aligned)]
    source = ASTSource(
        fn=kernel,
        signature={name: kinds[name] for name in names},
        constexprs={(names.index("BLOCK"),): loss_kernels.BLOCK},
        attrs={(index,): [["tt.divisibility", 16]] for index in even},
    )
    options = {"num_warps": loss_kernels.NUM_WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = compiled.asm["ptx"]
    found.append({
        "wide loads": len(re.findall(r"ld\.global\.v4\.b32", text)),
        "wide stores": len(re.findall(r"st\.global\.v4\.b32", text)),
        "exponentials": text.count("ex2.approx"),
        "row addresses": re.findall(r"arith\.muli %row\w*, %\w+ : (i\d+)", compiled.asm["ttir"]),
        **usage_of(compiled),
    })
sys.stdout.write(json.dumps(found))
"""

KERNELS = ("statistics_kernel", "gradient_kernel")
CASES = [(*case, True) for case in itertools.product((80, 90), KERNELS, ("bf16", "fp16", "fp32"))]
UNALIGNED = [(90, kernel, "bf16", False) for kernel in KERNELS]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return run_compiling(COMPILE, [*CASES, *UNALIGNED])


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case[:3])) for case in CASES])
def test_the_kernels_compile_to_wide_accesses_and_few_registers(compiled: list[dict[str, Any]], index: int) -> None:
    _, name, kind, _ = CASES[index]
    kernel = compiled[index]
    # A thread has 8 logits a round: one access of 16 bytes, or two in float32. The statistics have a second, masked loop.
    accesses = 2 if kind == "fp32" else 1
    if name == "gradient_kernel":
        assert (kernel["wide loads"], kernel["wide stores"]) == (accesses, accesses)
        assert kernel["exponentials"] == 8, "one a logit"
    else:
        assert kernel["wide loads"] == 2 * accesses
        # Each loop has one a logit and one a lane (two in float32, whose lanes are on two threads); one more at the end.
        assert kernel["exponentials"] <= 2 * 8 + 6
    assert kernel["stack"] == 0
    # An SM has 65,536 registers and at most 2,048 threads: with 32 registers it holds all of them.
    assert kernel["registers"] <= 32
    assert kernel["shared"] <= 1024


def test_row_addresses_have_64_bits(compiled: list[dict[str, Any]]) -> None:
    """Rows times columns exceed 2^31 at a micro-batch of 42 samples of 1,024 tokens."""
    assert [kernel["row addresses"] for kernel in compiled] == [["i64"]] * len(compiled)


def test_rows_of_any_length_compile(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled[len(CASES) :]:
        assert kernel["wide loads"] == 0, "a row may begin at any address"
        assert kernel["stack"] == 0
