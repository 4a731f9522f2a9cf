"""The element-wise kernels' compiled code for A100 (sm_80) and H100/H200 (sm_90); no device is needed to compile and read it."""

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
from megatron_lion.model import elementwise_kernels, elementwise_launch, layer_norm_kernels

FLOATS = {"means", "inverses", "partials"}
SCALARS = {"eps": "fp32", "scale": "fp32"}
SIZES = {"ROWS": 64, "STEP": elementwise_launch.STEP, "COLUMNS": elementwise_launch.COLUMNS}
found = []
for capability, name, kind, options in json.loads(sys.argv[1]):
    kernel = getattr(layer_norm_kernels, name, None) or getattr(elementwise_kernels, name)
    names, constants = kernel.arg_names, {**SIZES, **options}
    tensors = {"x", "y", "dy", "dx", "weight", "bias", "residual", "residual_gradient", "out", "query", "key", "value",
               "joined", "first", "second"}
    signature = {}
    for argument in names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in tensors:
            signature[argument] = "*" + kind
        elif argument in FLOATS:
            signature[argument] = "*fp32"
        elif argument == "seed":
            signature[argument] = "*i64"
        else:
            signature[argument] = SCALARS.get(argument, "i32")
    # Triton finds out at each launch which addresses and numbers are multiples of 16.
    even = [index for index, argument in enumerate(names)
            if signature[argument].startswith("*") or argument in ("width", "channels") or re.search("_[sbn]$", argument)]
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items() if key in names},
        attrs={(index,): [["tt.divisibility", 16]] for index in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": elementwise_launch.NUM_WARPS})
    text = compiled.asm["ptx"]
    found.append({
        "loads": sorted(re.findall(r"ld\.global[\w.]*?(v[24]\.b\d+|\.b\d+)", text)),
        "stores": sorted(re.findall(r"st\.global[\w.]*?(v[24]\.b\d+|\.b\d+)", text)),
        "barriers": text.count("bar.sync"),
        **usage_of(compiled),
    })
sys.stdout.write(json.dumps(found))
"""

NORM = {"BLOCK": 1024}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm": ("layer_norm_kernel", {**NORM, "ROWS": 4}),
    "norm backward": ("layer_norm_backward_kernel", {**NORM, "HAS_RESIDUAL": True}),
    "tanh": ("bias_gelu_kernel", {"ERF": False}),
    "erf": ("bias_gelu_kernel", {"ERF": True}),
    "tanh backward": ("bias_gelu_backward_kernel", {"ERF": False}),
    "erf backward": ("bias_gelu_backward_kernel", {"ERF": True}),
    "add": ("bias_dropout_add_kernel", {"DROPOUT": False}),
    "dropout": ("bias_dropout_add_kernel", {"DROPOUT": True}),
    "add backward": ("dropout_backward_kernel", {"DROPOUT": False}),
    "dropout backward": ("dropout_backward_kernel", {"DROPOUT": True}),
    "qkv": ("join_qkv_kernel", {"STEP": 32, "COLUMNS": 64}),
    "sums": ("column_sums_kernel", {"STEP": 32, "COLUMNS": 32, "ADD": False}),
}
# 16-byte accesses of a bf16 kernel for each pass of its loop: a program of 128 threads has 2,048 elements of a tensor at a
# time (two accesses a thread), a row of LayerNorm 1,024 (one).
WIDE = {
    "norm": (3, 1), "norm backward": (4, 1), "tanh": (2, 2), "erf": (2, 2), "tanh backward": (4, 2), "erf backward": (4, 2),
    "add": (4, 2), "dropout": (4, 2), "add backward": (2, 0), "dropout backward": (2, 2), "qkv": (2, 2), "sums": (2, 0),
}  # fmt: skip
CASES = [(capability, *KERNELS[name][:1], kind, KERNELS[name][1]) for capability, name, kind in
         itertools.product((80, 90), KERNELS, ("bf16", "fp32"))]  # fmt: skip
NAMES = [
    f"sm_{capability} {name} {kind}"
    for capability, name, kind in itertools.product((80, 90), KERNELS, ("bf16", "fp32"))
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return dict(zip(NAMES, run_compiling(COMPILE, CASES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_compile_to_wide_accesses_without_spills(compiled: dict[str, dict[str, Any]], name: str) -> None:
    kernel, kind = compiled[name], name.rsplit(" ", 1)[1]
    wide_loads, wide_stores = (sum(access == "v4.b32" for access in kernel[key]) for key in ("loads", "stores"))
    loads, stores = WIDE[name.split(" ", 1)[1].rsplit(" ", 1)[0]]
    width = 2 if kind == "fp32" else 1
    if "norm backward" in name:
        wide_stores -= 4  # of partial sums, always float32
    if "sums" in name:
        width = 1  # it reads float32 in every case
    if "qkv" in name:  # the compiler makes a loop for each of the three
        assert kernel["loads"] == ["v4.b32"] * wide_loads
        assert len(kernel["stores"]) == wide_stores + 1
    else:
        assert (wide_loads, wide_stores) == (loads * width, stores * width), kernel
    assert kernel["stack"] == 0
    # Half of an SM's 2,048 threads have 64 registers each; that is enough for accesses that are all of 16 bytes.
    assert kernel["registers"] <= (128 if kind == "fp32" else 80)
    assert kernel["shared"] <= 4096
