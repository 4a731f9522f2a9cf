"""The kernels of a layer's element-wise work against the same operations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch.nn import functional as F

from megatron_lion.model import elementwise_launch as launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding to nearest, relative; half the distance of subnormal numbers.
ROUNDING = {torch.float32: (2**-24, 0.0), torch.bfloat16: (2**-8, 2**-134), torch.float16: (2**-11, 2**-25)}
# Rows in the last program of 32, or of 64; columns beyond a tile, and fewer than a group of Philox.
CASES = [
    *((dtype, shape) for dtype in DTYPES[:2] for shape in ((5, 3), (70, 264))),
    (torch.bfloat16, (1, 8)),
    (torch.float16, (33, 40)),
]


def draw(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype).to(DEVICE)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, condition: torch.Tensor | float) -> None:
    """Asserts that `found` is `exact`, rounded once, up to float32 errors of numbers as large as `condition`."""
    relative, absolute = ROUNDING[found.dtype]
    bound = exact.abs() * relative * 1.001 + absolute + 2e-6 * condition
    apart = (found.double().cpu() - exact.cpu()).abs()
    assert bool((apart <= torch.as_tensor(bound).cpu()).all()), float((apart / torch.as_tensor(bound).cpu()).max())


def gradients(
    function: Callable[..., Any], inputs: list[torch.Tensor], upstream: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns outputs and gradients of a function in float64."""
    leaves = [tensor.double().cpu().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.autograd.backward(outputs, [tensor.double().cpu() for tensor in upstream])
    return [output.detach() for output in outputs], [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, int], with_residual: bool) -> None:
    x, dy = draw(dtype, *shape, shift=3.0), draw(dtype, *shape, seed=1)
    weight, bias = draw(dtype, shape[1], seed=2, shift=1.0), draw(dtype, shape[1], seed=3)
    residual = draw(dtype, *shape, seed=4) if with_residual else None
    y, means, inverses = launch.layer_norm(x, weight, bias, 1e-5)
    found = launch.layer_norm_backward(dy, residual, x, weight, bias, means, inverses)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5), x * 1

    upstream = [dy, torch.zeros_like(x) if residual is None else residual]
    (exact, _), expected = gradients(plain, [x, weight, bias], upstream)
    spread = float(inverses.max()) * 10
    assert_rounded(y, exact, spread)
    assert_rounded(means, x.double().mean(-1), 4.0)
    assert_rounded(inverses, (x.double().var(-1, unbiased=False) + 1e-5).rsqrt(), spread)
    assert_rounded(found[0], expected[0], spread**2)
    for index in (1, 2):
        assert_rounded(found[index], expected[index], spread * shape[0])


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("form", ["tanh", "erf"])
def test_bias_gelu(dtype: torch.dtype, shape: tuple[int, int], form: str) -> None:
    x, dy = draw(dtype, *shape, scale=3.0), draw(dtype, *shape, seed=1)
    bias = draw(dtype, shape[1], seed=2)
    y = launch.bias_gelu(x, bias, erf=form == "erf")
    dx, d_bias = launch.bias_gelu_backward(dy, x, bias, erf=form == "erf")
    approximate = "none" if form == "erf" else "tanh"
    (exact,), expected = gradients(lambda x, b: F.gelu(x + b, approximate=approximate), [x, bias], [dy])
    assert_rounded(y, exact, 4.0)
    assert_rounded(dx, expected[0], 4.0)
    assert_rounded(d_bias, expected[1], 4.0 * shape[0])


@pytest.mark.parametrize("form", ["tanh", "erf"])
def test_gelu_of_special_numbers(form: str) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-40, 30.0, -30.0, 3e38, -3e38, math.inf, -math.inf, math.nan]], device=DEVICE)
    zero = torch.zeros(10, device=DEVICE)
    y = launch.bias_gelu(x, zero, erf=form == "erf")[0].cpu()
    dx, _ = launch.bias_gelu_backward(torch.ones_like(x), x, zero, erf=form == "erf")
    assert y[:7].tolist() == [0.0, 0.0, pytest.approx(5e-41, abs=1e-44), 30.0, 0.0, pytest.approx(3e38), 0.0]
    # GELU(-inf) is -inf * 0; torch's is NaN too, and a model that has it has diverged.
    assert y[7] == math.inf
    assert y[8:].isnan().all()
    assert dx[0, :5].tolist() == [0.5, 0.5, 0.5, 1.0, pytest.approx(0.0, abs=1e-30)]
    assert dx[0, 9].isnan()


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_bias_dropout_add(dtype: torch.dtype, shape: tuple[int, int], probability: float) -> None:
    x, residual, dy = (draw(dtype, *shape, seed=seed) for seed in range(3))
    bias = draw(dtype, shape[1], seed=3)
    torch.manual_seed(0)
    dropout = launch.Dropout.draw(probability, DEVICE)
    out = launch.bias_dropout_add(x, bias, residual, dropout)
    dx, d_bias = launch.bias_dropout_add_backward(dy, bias, dropout)
    mask = mask_of(dropout, shape)
    scale = 2**16 / (2**16 - dropout.threshold)
    (exact,), expected = gradients(lambda x, b, r: r + (x + b) * mask * scale, [x, bias, residual], [dy])
    assert_rounded(out, exact, 10.0)
    assert_rounded(dx, expected[0], 4.0)
    assert_rounded(d_bias, expected[1], 4.0 * shape[0])
    assert (dx is dy) is (probability == 0.0)


def mask_of(dropout: launch.Dropout, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns which elements are kept, float64, from the output for x = 1."""
    zero = torch.zeros(shape, device=DEVICE)
    kept = launch.bias_dropout_add(torch.ones_like(zero), torch.zeros(shape[-1], device=DEVICE), zero, dropout)
    return (kept != 0).double().cpu()


def philox(key: int, counter: int) -> list[int]:
    """Philox 4x32 with 10 rounds, from the paper; returns 4 numbers of 32 bits."""
    low = 2**32 - 1
    k0, k1 = key & low, key >> 32
    c = [counter, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & low, (a >> 32) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def test_dropout_takes_16_bits_of_philox_for_each_element() -> None:
    rows, width, seed = 3, 20, 0x1234_5678_9ABC_DEF
    threshold = philox(seed, 0)[0] & 0xFFFF  # a draw that is equal to it is kept
    kept = mask_of(launch.Dropout(torch.tensor([seed], device=DEVICE), threshold), (rows, width))
    for row in range(rows):
        for group in range(3):
            words = philox(seed, row * 3 + group)
            draws = sorted(half for word in words for half in (word & 0xFFFF, word >> 16))
            mine = kept[row, 8 * group : 8 * group + 8]
            if len(mine) == 8:  # the order within the group is the kernel's own
                assert int(mine.sum()) == sum(value >= threshold for value in draws)


def test_dropout_drops_the_right_share_independently() -> None:
    torch.manual_seed(3)
    share, shape = 0.1, (256, 1024)
    kept = mask_of(launch.Dropout.draw(share, DEVICE), shape)
    dropped, count = 1 - kept, kept.numel()
    deviation = math.sqrt(count * share * (1 - share))
    assert abs(float(dropped.sum()) - count * round(share * 2**16) / 2**16) < 4.5 * deviation
    centred = dropped - share
    for lag in (1, 2, 3, 7, 8, 1023, 1024):  # neighbours in a group, in the next group, in the next row
        flat = centred.flatten()
        correlation = float((flat[:-lag] * flat[lag:]).mean()) / (share * (1 - share)) * math.sqrt(count)
        assert abs(correlation) < 4.5, lag
    again = mask_of(launch.Dropout.draw(share, DEVICE), shape)
    both = float(((1 - again) * dropped).sum())
    assert abs(both - count * share**2) < 4.5 * math.sqrt(count * share**2), "another draw is another mask"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("sequence", "batch", "heads", "channels"), [(7, 3, 2, 8), (33, 1, 3, 20), (1, 2, 1, 64)])
@pytest.mark.parametrize("order", ["SBND", "BNSD", "BSND", "DSBN"])
def test_join_qkv(dtype: torch.dtype, sequence: int, batch: int, heads: int, channels: int, order: str) -> None:
    sizes = dict(zip("SBND", (sequence, batch, heads, channels), strict=True))
    parts = []
    for seed in range(3):
        stored = draw(dtype, *(sizes[letter] for letter in order), seed=seed)
        parts.append(stored.permute(*(order.index(letter) for letter in "SBND")))
    # The three may have different strides.
    parts[1] = parts[1].contiguous()
    bias = draw(dtype, 3 * heads * channels)
    joined, d_bias = launch.join_qkv(tuple(parts), bias)
    assert joined.shape == (sequence, batch, heads, 3 * channels)
    assert joined.is_contiguous()
    assert torch.equal(joined, torch.cat(parts, dim=-1))
    exact = torch.cat(parts, dim=-1).double().sum(dim=(0, 1)).flatten()
    assert_rounded(d_bias, exact, 4.0 * sequence * batch)


@examples(25)
@given(
    rows=st.integers(1, 80),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([0.0, -20.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_any_rows_are_normalised(
    rows: int, width: int, dtype: torch.dtype, scale: float, shift: float, seed: int
) -> None:
    x = draw(dtype, rows, width, seed=seed, scale=scale, shift=shift)
    ones, zeros = torch.ones(width, dtype=dtype, device=DEVICE), torch.zeros(width, dtype=dtype, device=DEVICE)
    y, means, inverses = launch.layer_norm(x, ones, zeros, 1e-5)
    exact = F.layer_norm(x.double(), (width,), eps=1e-5)
    # An error of 2^-24 of the mean is divided by the deviation.
    condition = 1 + inverses.double().max() * (means.double().abs().max() + 1e-3) / 10
    assert_rounded(y, exact, float(condition))


def test_many_tokens_take_longer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums over more rows a program are the same but for their rounding."""
    x, dy, bias = (draw(torch.float32, *shape) for shape in ((130, 24), (130, 24), (24,)))
    few = launch.bias_gelu_backward(dy, x, bias, erf=False)
    monkeypatch.setattr(launch, "MANY_TOKENS", 100)
    many = launch.bias_gelu_backward(dy, x, bias, erf=False)
    assert torch.equal(few[0], many[0])
    torch.testing.assert_close(few[1], many[1], rtol=1e-5, atol=1e-5)
