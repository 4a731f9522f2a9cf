"""The fused loss: values and gradients against float64 and megatron-core, what it does to memory, and when it is chosen."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch.nn import functional as F

from megatron_lion.device import Device
from megatron_lion.errors import EnvironmentFault
from megatron_lion.model import kernel_choice
from megatron_lion.model.fused_loss import fused_cross_entropy, plain_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding to nearest, relative, and half the distance of subnormal numbers.
ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2**-8, 2**-134), torch.float16: (2**-11, 2**-25)}


def case(dtype: torch.dtype, rows: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits far from 0, as GPT-2's are; labels; upstream gradients, every third of which is 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * 4 - 35).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.rand(rows, generator=generator) + 0.5
    upstream[2::3] = 0.0
    return logits, labels, upstream


def special_rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 20 logits, the first half of which is on the first of two ranks."""
    logits, labels, upstream = case(dtype, 13, 20)
    inf, nan = math.inf, math.nan
    upstream[:] = 1.0
    logits[0, 3] = nan
    logits[1, 13] = inf
    logits[2, [1, 5, 17]] = -inf
    logits[3] = -inf
    logits[4, 7], labels[4] = -inf, 7
    labels[5], labels[6], labels[7] = -1, 20, 2**40
    upstream[8] = 0.0
    logits[9, 2], upstream[9] = nan, 0.0
    logits[10, :10], labels[10] = -inf, 15
    logits[11, :10], labels[11] = -inf, 4
    logits[12, 11], upstream[12] = inf, 0.0
    return logits, labels, upstream


def backward(
    loss: Any, logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, *more: Any
) -> list[torch.Tensor]:
    """Returns losses and gradients of the logits, on the CPU."""
    leaf = logits.detach().to(DEVICE, copy=True).requires_grad_()
    losses = loss(leaf * 1, labels.to(DEVICE), *more)
    losses.backward(upstream.to(DEVICE))
    assert leaf.grad is not None
    return [losses.detach().cpu(), leaf.grad.cpu()]


def exact(logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    leaf = logits.detach().double().clone().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    losses.backward(upstream.double())
    assert leaf.grad is not None
    return [losses.detach(), leaf.grad]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Checks losses and gradients; the gradient is rounded once."""
    losses, gradient = found
    # Of maximum, sum and logarithm, each rounded to 2^-24 relative, and the sum of a row, whose lanes are added in turn.
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected[0], rtol=5e-7, atol=2e-6)
    relative, absolute = ROUNDING[gradient.dtype]
    # exp(x) is exact to |x| 2^-24, and |x| is below 50 here.
    torch.testing.assert_close(
        gradient.double(), expected[1], rtol=relative + 5e-6, atol=absolute + 1e-12 + 2e-7 * (relative == 0)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 7), (4, 1000), (3, 2048), (3, 4097), (2, 50304)])
def test_losses_and_gradients_are_those_of_float64(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits, labels, upstream = case(dtype, rows, vocab)
    found = backward(fused_cross_entropy, logits, labels, upstream)
    assert_near(found, exact(logits, labels, upstream))
    assert not found[1][upstream == 0].any(), "a masked row has no gradient"


@given(
    rows=st.integers(1, 4), vocab=st.integers(1, 40), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    offset=st.sampled_from([0.0, -80.0, 300.0]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
@examples(40)
def test_any_rows(rows: int, vocab: int, scale: float, offset: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale + offset).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    losses, gradient = backward(fused_cross_entropy, logits, labels, torch.ones(rows))
    plain, plain_gradient = backward(plain_cross_entropy, logits.float(), labels, torch.ones(rows))
    expected = exact(logits, labels, torch.ones(rows))
    torch.testing.assert_close(losses.double(), expected[0], rtol=5e-7, atol=2e-6)
    relative, absolute = ROUNDING[dtype]
    torch.testing.assert_close(gradient.double(), expected[1], rtol=relative + 3e-5, atol=absolute + 3e-7)
    torch.testing.assert_close(plain.double(), expected[0], rtol=5e-7, atol=2e-6)
    torch.testing.assert_close(plain_gradient.double(), expected[1], rtol=3e-5, atol=3e-7)


def on_ranks(rank: int, ranks: int) -> dict[str, Any]:
    """Losses and gradients of this rank's part of the vocabulary, by both losses; likeliest tokens; the chosen loss."""
    from unittest.mock import patch

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_lion.device import select_device
    from megatron_lion.model.bert import likeliest_tokens
    from megatron_lion.parallel import process_groups

    found: dict[str, Any] = {}
    with process_groups(select_device("cpu"), tensor_model_parallel_size=ranks, pipeline_model_parallel_size=1):
        group = parallel_state.get_tensor_model_parallel_group()
        for name, (logits, labels, upstream) in cases().items():
            part = logits.chunk(ranks, dim=-1)[rank].contiguous()
            with patch.object(
                torch.distributed, "all_gather_into_tensor", wraps=torch.distributed.all_gather_into_tensor
            ) as spy:
                ours = backward(fused_cross_entropy, part, labels, upstream, group)
            found[name] = [*ours, *backward(vocab_parallel_cross_entropy, part, labels, upstream), spy.call_count]
        ties = tied_logits().chunk(ranks, dim=-1)[rank]
        found["likeliest"] = likeliest_tokens(ties)
        gpu: Any = SimpleNamespace(kind="cuda", torch_device=torch.device("cpu"))
        found["chosen"] = [kernel_choice.choose_loss("auto", gpu)]
        with patch.object(kernel_choice, "why_no_triton", lambda: "no compiler" if rank == ranks - 1 else None):
            found["chosen"].append(kernel_choice.choose_loss("auto", gpu))
    return found


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    shapes = {"odd": (7, 14), "long": (3, 4098)}
    plain = {f"{name} {dtype}": case(dtype, *shape) for name, shape in shapes.items() for dtype in DTYPES}
    return plain | {f"special {dtype}": special_rows(dtype) for dtype in DTYPES}


def tied_logits() -> torch.Tensor:
    """bfloat16 [5, 40, 6] of few values, so that most rows have their maximum more than once."""
    return torch.randint(-3, 4, (5, 40, 6), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) / 4


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_distributed(on_ranks, request.param, request.param)


@pytest.mark.parametrize("name", list(cases()))
def test_every_layout_has_megatron_cores_losses_and_gradients(ranks: list[dict[str, Any]], name: str) -> None:
    logits, labels, upstream = cases()[name]
    losses = ranks[0][name][0]
    assert all(torch.equal(losses.view(torch.int32), rank[name][0].view(torch.int32)) for rank in ranks), (
        "the same on all ranks"
    )
    gradient, theirs = (torch.cat([rank[name][index] for rank in ranks], dim=-1) for index in (1, 3))
    torch.testing.assert_close(losses, ranks[0][name][2], rtol=5e-7, atol=2e-6, equal_nan=True)
    relative, absolute = ROUNDING[logits.dtype]
    # Two numbers that are rounded once each.
    torch.testing.assert_close(
        gradient, theirs, rtol=2 * relative + 5e-6, atol=2 * absolute + 2e-7 * (relative == 0), equal_nan=True
    )
    assert ((gradient == theirs) | gradient.isnan()).float().mean() > (0.5 if relative == 0 else 0.99)
    assert [rank[name][4] for rank in ranks] == [int(len(ranks) > 1)] * len(ranks), (
        "one collective, and none on one rank"
    )
    if not name.startswith("special"):
        assert_near([losses, gradient], exact(logits, labels, upstream))


def test_special_rows(ranks: list[dict[str, Any]]) -> None:
    name = f"special {torch.bfloat16}"
    losses = ranks[0][name][0]
    gradient = torch.cat([rank[name][1] for rank in ranks], dim=-1)
    assert [row for row in range(13) if losses[row].isnan()] == [0, 1, 3, 9, 12]
    assert losses[4] == losses[11] == math.inf
    assert gradient.isnan().all(dim=-1).tolist() == losses.isnan().tolist(), "also if the row is masked"
    assert not gradient[8].any()
    for row in (5, 6, 7):  # without a known label: log Σ exp(x - max), and the softmax alone
        x = special_rows(torch.bfloat16)[0][row].double()
        assert float(losses[row]) == pytest.approx(float((x - x.max()).exp().sum().log()), rel=1e-6)
        torch.testing.assert_close(gradient[row].double(), x.softmax(-1), rtol=2**-8 * 1.01, atol=0.0)


def test_likeliest_tokens_need_no_float32(ranks: list[dict[str, Any]]) -> None:
    logits = tied_logits().chunk(1, dim=-1)[0].double()
    best = logits == logits.amax(dim=-1, keepdim=True)
    expected = best.int().argmax(dim=-1)
    assert (best.sum(dim=-1) > 1).float().mean() > 0.3
    assert all(torch.equal(rank["likeliest"], expected) for rank in ranks)


def test_one_rank_without_triton_decides_for_its_group(ranks: list[dict[str, Any]]) -> None:
    assert [rank["chosen"] for rank in ranks] == [["fused", "megatron"]] * len(ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 2049])
def test_nothing_beside_the_logits_is_written(dtype: torch.dtype, vocab: int) -> None:
    """Logits in the middle of a larger tensor; labels outside of the vocabulary would be in their neighbours."""
    around = torch.full((3 * vocab + 20,), math.nan, dtype=dtype, device=DEVICE)
    logits = around[10 : 10 + 3 * vocab].view(3, vocab)
    logits.copy_(case(dtype, 3, vocab)[0])
    before = around.clone()
    labels = torch.tensor([-3, vocab + 2, 0], device=DEVICE)
    losses = fused_cross_entropy(logits.detach().requires_grad_(), labels)
    assert losses.isfinite().all()
    assert torch.equal(around, before) or torch.equal(around[10:-10], before[10:-10]), "the forward pass reads only"
    losses.sum().backward()
    assert around[:10].isnan().all()
    assert around[-10:].isnan().all()
    assert logits.isfinite().all()


def test_the_gradient_lies_in_the_logits_memory() -> None:
    logits, labels, upstream = (tensor.to(DEVICE) for tensor in case(torch.bfloat16, 4, 100))
    seen: list[int] = []
    product = logits.requires_grad_() * 1
    product.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    fused_cross_entropy(product, labels).backward(upstream)
    assert seen == [product.data_ptr()]


def test_without_gradients_only_losses_are_computed() -> None:
    logits, labels, _ = (tensor.to(DEVICE) for tensor in case(torch.bfloat16, 4, 100))
    before = logits.clone()
    with torch.no_grad():
        losses = fused_cross_entropy(logits.requires_grad_(), labels)
    assert not losses.requires_grad
    assert torch.equal(logits, before)


def test_other_memory_orders_and_shapes() -> None:
    """[S, B, V] in another order is copied, so the caller's logits stay."""
    logits, labels, upstream = case(torch.float32, 6, 50)
    for order in (lambda tensor: tensor.view(2, 3, 50), lambda tensor: tensor.t().contiguous().t().unsqueeze(1)):
        shaped = order(logits)
        losses, gradient = backward(
            fused_cross_entropy, shaped, labels.view(shaped.shape[:2]), upstream.view(shaped.shape[:2])
        )
        assert losses.shape == shaped.shape[:2]
        assert_near([losses.flatten(), gradient.reshape(6, 50)], exact(logits, labels, upstream))
    assert backward(fused_cross_entropy, logits[:0], labels[:0], upstream[:0])[0].shape == (0,)


def test_a_second_backward_pass_is_refused() -> None:
    logits, labels, upstream = (tensor.to(DEVICE) for tensor in case(torch.float32, 4, 100))
    losses = fused_cross_entropy(logits.requires_grad_() * 1, labels)
    losses.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass is not possible.*model\.loss megatron"):
        losses.backward(upstream)


def test_another_use_of_the_logits_is_refused_in_the_backward_pass() -> None:
    logits, labels, _ = (tensor.to(DEVICE) for tensor in case(torch.float32, 4, 100))
    product = logits.requires_grad_() * 1
    squares = product.square().sum()  # saves the logits, which it would read after they are overwritten
    with pytest.raises(RuntimeError, match="inplace operation"):
        (fused_cross_entropy(product, labels).sum() + squares).backward()


def test_the_choice_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", 0, "gloo")
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda: None)
    for kernel, works in (("interpreted", True), ("compiled", False)):
        monkeypatch.setattr(kernel_choice, "triton_kernel", lambda kernel=kernel: kernel)
        assert kernel_choice.choose_loss("auto", cpu) == kernel_choice.choose_loss("megatron", cpu) == "megatron"
        if works:
            assert kernel_choice.choose_loss("fused", cpu) == "fused"
        else:
            with pytest.raises(
                EnvironmentFault, match=r"model\.loss: fused: device cpu is used; set TRITON_INTERPRET=1"
            ):
                kernel_choice.choose_loss("fused", cpu)
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda: "no C compiler")
    with pytest.raises(EnvironmentFault, match=r"model\.loss: fused: no C compiler; or use auto or megatron"):
        kernel_choice.choose_loss("fused", Device("cuda", 0, "nccl"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_logits() -> None:
    rows, vocab = 2**31 // 50304 + 2, 50304
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    last, labels, _ = case(torch.bfloat16, 1, vocab)
    logits[-1] = last[0].cuda()
    all_labels = labels.cuda().expand(rows)
    losses = fused_cross_entropy(logits.requires_grad_(), all_labels)
    losses.backward(torch.ones_like(losses))
    assert_near([losses[-1:].detach().cpu(), logits[-1:].detach().cpu()], exact(last, labels, torch.ones(1)))
