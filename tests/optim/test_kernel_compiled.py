"""The kernel's compiled code for A100 (sm_80) and H100/H200 (sm_90); no device is needed to compile and read it."""

from __future__ import annotations

import pytest
from compiled_kernels import run_compiling

COMPILE = r"""
import json, re, sys
import triton
from compiled_kernels import instructions_of, longest_path, usage_of
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_lion.optim.agreement import agreement_kernel
from megatron_lion.optim.grad_norm import BLOCK as NORM_BLOCK
from megatron_lion.optim.grad_norm import PROGRAMS
from megatron_lion.optim.kernels import lion_kernel
from megatron_lion.optim.norm_kernels import scalars_kernel, square_sum_kernel
from megatron_lion.optim.kernel_launch import SHAPES

def facts(kernel):
    text = kernel.asm["ptx"]
    return {
        "fused": len(re.findall(r"\bfma\.rn\.f32", text)),
        "flushed": text.count(".ftz"),
        "losing_nan": len(re.findall(r"\b(?:max|min)\.f32", text)),
        "wide": len(re.findall(r"(?:ld|st)\.global\.v[24]\.b32", text)),
        **usage_of(kernel),
    }


def whole_chunk(kernel, shape):
    # Of a thread of a whole chunk, which alone stores 8 or 16 bytes at a time.
    path = longest_path(instructions_of(kernel), r"STG\.E\.(64|128)")
    return {
        "instructions": len(path) / (shape.block / (32 * shape.warps)),
        "barriers": sum("BAR." in text for text in path),
        "shuffles": sum("SHFL" in text for text in path) * shape.part / shape.block,
    }


pointers = {"rows": "*i64", "chunks": "*i32", "groups": "*fp32", "lr_addresses": "*i64", "multiplier": "*fp32",
            "found_inf": "*fp32", "cautions": "*fp32"}
found = []
for capability, param, grad, master, momentum in json.loads(sys.argv[1]):
    fixed = {"PARAM_TYPE": getattr(tl, param), "GRAD_TYPE": getattr(tl, grad), "MASTER_WEIGHTS": master,
             "MOMENTUM": momentum, "BEGIN": True, "CAUTIOUS": False, "MAXIMIZE": False, "NUM_MULTIPLIERS": 2,
             "HAS_FOUND_INF": True, "ALIGNED": True, "BLOCK": SHAPES[momentum].block, "PART": SHAPES[momentum].part}
    source = ASTSource(
        fn=lion_kernel,
        signature={**pointers, **dict.fromkeys(fixed, "constexpr")},
        constexprs={(lion_kernel.arg_names.index(name),): value for name, value in fixed.items()},
    )
    options = {"num_warps": SHAPES[momentum].warps, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found.append({**facts(kernel), **whole_chunk(kernel, SHAPES[momentum])})
# Variants that the cases above leave out: no multiplier, found_inf or alignment; float16; cautious; maximize.
for param, grad, master, momentum, aligned, cautious in (
    (tl.float16, tl.float16, "none", "fp32", False, False),
    (tl.float16, tl.float32, "fp32", "bf16", True, True),
    (tl.float32, tl.float32, "none", "int8", False, True),
):
    fixed = {"PARAM_TYPE": param, "GRAD_TYPE": grad, "MASTER_WEIGHTS": master, "MOMENTUM": momentum, "BEGIN": False,
             "CAUTIOUS": cautious, "MAXIMIZE": True, "NUM_MULTIPLIERS": 0, "HAS_FOUND_INF": False, "ALIGNED": aligned,
             "BLOCK": SHAPES[momentum].block, "PART": SHAPES[momentum].part,
             "multiplier": None, "found_inf": None, **({} if cautious else {"cautions": None})}
    signature = {name: kind for name, kind in pointers.items() if name not in fixed}
    source = ASTSource(
        fn=lion_kernel,
        signature={**signature, **dict.fromkeys(fixed, "constexpr")},
        constexprs={(lion_kernel.arg_names.index(name),): value for name, value in fixed.items()},
    )
    options = {"num_warps": SHAPES[momentum].warps, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found.append({"fused": len(re.findall(r"\bfma\.", kernel.asm["ptx"]))})
for momentum in ("fp32", "bf16", "int8"):
    fixed = {"GRAD_TYPE": tl.bfloat16, "MOMENTUM": momentum, "BEGIN": True, "MAXIMIZE": True, "NUM_MULTIPLIERS": 2,
             "ALIGNED": True, "BLOCK": SHAPES[momentum].block}
    signature = {name: pointers[name] for name in ("rows", "chunks", "groups", "multiplier")}
    source = ASTSource(
        fn=agreement_kernel,
        signature={**signature, "counts": "*i64", **dict.fromkeys(fixed, "constexpr")},
        constexprs={(agreement_kernel.arg_names.index(name),): value for name, value in fixed.items()},
    )
    options = {"num_warps": SHAPES[momentum].warps, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found.append({"fused": len(re.findall(r"\bfma\.", kernel.asm["ptx"]))})
for capability in (80, 90):
    for fixed, signature, kernel, warps in (
        ({"GRAD_TYPE": tl.float32, "HAS_DIVISOR": True, "ADD": False, "ALIGNED": True, "PROGRAMS": PROGRAMS, "BLOCK": NORM_BLOCK},
         {"rows": "*i64", "chunks": "*i32", "num_chunks": "i32", "divisor": "*fp64", "partials": "*fp64"}, square_sum_kernel, 8),
        ({"NUM_COUNTS": 2, "HAS_DIVISOR": True, "CLIPS": True, "PROGRAMS": PROGRAMS},
         {"partials": "*fp64", "divisor": "*fp64", "counts": "*fp64", "norm": "*fp64", "multipliers": "*fp32", "found_inf": "*fp32",
          "clip_grad": "*fp64"}, scalars_kernel, 4),
    ):
        source = ASTSource(
            fn=kernel,
            signature={**signature, **dict.fromkeys(fixed, "constexpr")},
            constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        )
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": False})
        found.append(facts(built))
sys.stdout.write(json.dumps(found))
"""

CASES = [
    # capability, parameter, gradient, master weights, momentum, wide accesses and instructions an element of a whole chunk
    (80, "float32", "float32", "none", "fp32", 5, 34),
    (90, "float32", "float32", "none", "fp32", 5, 34),
    (80, "bfloat16", "float32", "split32", "fp32", 7, 43),
    (90, "bfloat16", "float32", "split32", "fp32", 7, 43),
    (90, "bfloat16", "bfloat16", "split32", "bf16", 7, 52),
    (90, "bfloat16", "float32", "fp32", "fp32", 6, 42),
    (80, "bfloat16", "float32", "split24", "int8", 18, 45),
    (90, "bfloat16", "float32", "split24", "int8", 18, 45),
    (90, "bfloat16", "bfloat16", "split24", "int8", 16, 45),
    (90, "bfloat16", "float32", "split32", "int8", 18, 45),
    (90, "bfloat16", "float32", "fp32", "int8", 16, 49),
    (90, "float32", "float32", "none", "int8", 12, 45),
]


@pytest.fixture(scope="module")
def compiled():
    return run_compiling(COMPILE, [case[:5] for case in CASES])


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case[:5])) for case in CASES])
def test_the_kernel_compiles_to_wide_exact_code(compiled, index):
    kernel, (*_, momentum, wide, instructions) = compiled[index], CASES[index]
    assert kernel["fused"] == 0
    assert kernel["flushed"] == kernel["losing_nan"] == 0
    assert kernel["wide"] >= wide
    assert kernel["stack"] == 0
    assert kernel["shared"] == kernel["barriers"] == 0
    assert kernel["instructions"] <= instructions
    # An SM has 65,536 registers and at most 2,048 threads: with 32 registers it holds all of them, with 56 still 1,152.
    assert kernel["registers"] <= (56 if momentum == "int8" else 32)
    # Eight elements a thread: two exchanges with the other three of a block; four elements: three exchanges, for two blocks.
    assert kernel["shuffles"] in ((2, 6) if momentum == "int8" else (0,))


def test_other_variants_and_the_counting_kernel_compile_to_exact_code(compiled):
    assert [kernel["fused"] for kernel in compiled[len(CASES) : len(CASES) + 6]] == [0] * 6


def test_the_norms_kernels_compile_to_wide_code_without_spills(compiled):
    for square_sum, scalars in (compiled[-4:-2], compiled[-2:]):
        # A chunk of 4096 elements is four accesses of 16 bytes for each of 256 threads, beside the masked last chunk.
        assert square_sum["wide"] >= 4
        assert square_sum["fused"] == square_sum["flushed"] == scalars["flushed"] == 0
        assert square_sum["stack"] == scalars["stack"] == 0
        assert square_sum["registers"] <= 80, "an SM then holds three programs, that is 48 KB of loads in flight"
