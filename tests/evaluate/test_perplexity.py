"""Window plans and stream scores equal loops over single tokens."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion.errors import ConfigError, DataError, NumericsError
from megatron_lion.evaluate import token_scores
from megatron_lion.evaluate.perplexity import WindowPlan, perplexity, plan_windows, stream_segments
from megatron_lion.evaluate.token_scores import LogitsScorer, SegmentScores, score_segments

VOCAB = 7


def score(tokens: list[int] | Tensor, plan: WindowPlan, scorer: object, **options: object) -> SegmentScores:
    """Scores a stream by a plan, as `evaluate` does."""
    segments = stream_segments(torch.as_tensor(tokens, dtype=torch.int64), plan)
    return score_segments(segments, scorer, seq_length=plan.seq_length, **options)


class Bigram:
    """A model whose -ln p(next | this) is a table."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.logp = torch.randn(VOCAB, VOCAB, dtype=torch.float64).log_softmax(-1)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        return -self.logp[tokens_BT[:, :-1], tokens_BT[:, 1:]]


@examples(200)
@given(st.integers(2, 90), st.integers(1, 30), st.data())
def test_every_target_is_scored_exactly_once_with_enough_context(
    n_tok: int, seq_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_length))
    plan = plan_windows(n_tok, seq_length, stride)
    windows = [plan.window(k) for k in range(plan.num_windows)]
    scored = Counter(t for w in windows for t in range(w.first_target, w.stop + 1))
    assert scored == Counter(range(1, n_tok))
    for k, window in enumerate(windows):
        assert window.start == k * stride
        assert window.stop - window.start <= seq_length
        assert window.num_scored >= 1
        if k > 0:
            assert window.first_target - window.start > seq_length - stride


@examples(40)
@given(st.integers(2, 120), st.integers(1, 20), st.integers(1, 4), st.integers(1, 5), st.data())
def test_stream_score_equals_a_loop_over_tokens(
    n_tok: int, seq_length: int, world_size: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_length))
    model = Bigram()
    tokens = torch.randint(0, VOCAB, (n_tok,), generator=torch.Generator().manual_seed(n_tok))
    expected = sum(-float(model.logp[tokens[t - 1], tokens[t]]) for t in range(1, n_tok))
    plan = plan_windows(n_tok, seq_length, stride)
    parts: list[Tensor] = []

    def keep(sums: Tensor) -> Tensor:
        parts.append(sums)
        return sums

    for rank in range(world_size):
        score(tokens, plan, model, rank=rank, world_size=world_size, batch_size=batch_size, all_reduce_sum=keep)
    loss_sum, count, *_ = torch.stack(parts).sum(0).tolist()
    assert count == n_tok - 1
    assert loss_sum == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


def tiny_gpt2(n_positions: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=50, n_positions=n_positions, n_embd=32, n_layer=2, n_head=2)
    # Large weights, so that context and position change the predictions.
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("detailed", [True, False])
def test_a_transformer_is_scored_as_by_a_naive_loop(stride: int, detailed: bool) -> None:
    seq_length, n_tok = 8, 30
    model = tiny_gpt2(seq_length)
    tokens = torch.randint(0, 50, (n_tok,), generator=torch.Generator().manual_seed(5))
    full = LogitsScorer(lambda ids, last: model(ids).logits[:, -last:])
    scorer = full if detailed else full.__call__
    scores = score(tokens, plan_windows(n_tok, seq_length, stride), scorer, batch_size=3)

    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for target in range(1, n_tok):
            # The first window that reaches the target, by its definition and one target at a time.
            start = 0
            while start + seq_length < target:
                start += stride
            logits = model(tokens[start:target][None]).logits[0, -1].double()
            expected -= logits.log_softmax(-1)[tokens[target]]
    assert scores.num_targets == n_tok - 1
    # fp32 logits of size ~10: 1e-6 relative each, averaged over 29 targets.
    assert scores.loss_sum == pytest.approx(float(expected), rel=1e-5)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "view" not in func.name():
            self.elements = max(self.elements, result.numel())
        return result


def test_the_output_layer_runs_in_parts_with_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has more elements than the logits of a part; each position has the score of the whole at once."""
    monkeypatch.setattr(token_scores, "ROWS", {"cpu": 7})
    random = torch.Generator().manual_seed(1)
    weight, states = torch.randn(1000, 4, generator=random), torch.randn(3, 9, 4, generator=random)
    tokens = torch.randint(1000, (3, 10), generator=random)
    parts = LogitsScorer(lambda ids, last: states[:, -last:], project=lambda hidden: hidden @ weight.T)
    with Largest() as largest:
        found = parts.score(tokens, 9)
    assert largest.elements == 7 * 1000
    logits = (states.double() @ weight.double().T).log_softmax(-1)
    expected = -logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], logits.argmax(-1) == tokens[:, 1:])
    torch.testing.assert_close(parts.score(tokens, 2)[0], found[0][:, -2:], rtol=1e-6, atol=1e-6)


def test_detailed_scores_report_the_likeliest_token() -> None:
    logits_BSV = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]]])
    nll, greedy = LogitsScorer(lambda ids, last: logits_BSV[:, -last:]).score(torch.tensor([[9, 0, 1]]), 2)
    assert greedy.tolist() == [[True, False]]
    expected = [-math.log(math.e**3 / (math.e**3 + 2)), -math.log(math.e / (1 + math.e + math.e**2))]
    assert nll[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_among_equal_logits_the_first_is_the_likeliest() -> None:
    """As torch's argmax has it on a CPU: few levels of logits, so most rows have several largest values."""
    random = torch.Generator().manual_seed(3)
    logits_BSV = torch.randint(4, (2, 40, 30), generator=random).float()
    first = (logits_BSV == logits_BSV.amax(-1, keepdim=True)).int().argmax(-1)
    others = torch.randint(30, first.shape, generator=random)
    targets = torch.where(torch.rand(first.shape, generator=random) < 0.5, first, others)
    tied = logits_BSV.gather(-1, targets.unsqueeze(-1)).squeeze(-1) == logits_BSV.amax(-1)
    assert (tied & (targets != first)).any(), "no target is a later one of the largest"
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.int64), targets], 1)
    _, greedy = LogitsScorer(lambda ids, last: logits_BSV[:, -last:]).score(ids, 40)
    assert torch.equal(greedy, targets == first)


def test_progress_counts_this_ranks_windows() -> None:
    seen: list[tuple[int, int]] = []
    plan = plan_windows(50, 10, 4)
    score([1] * 50, plan, Bigram(), rank=1, world_size=2, batch_size=2, progress=lambda *at: seen.append(at))
    mine = len(range(1, plan.num_windows, 2))
    assert seen[-1] == (mine, mine)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_model_that_gives_nan_is_refused() -> None:
    with pytest.raises(NumericsError, match="NaN or infinite"):
        score([1, 2, 3], plan_windows(3, 2, 2), lambda t: torch.full((len(t), 2), math.nan))


def test_huge_losses_do_not_crash() -> None:
    scores = score([1, 2, 3], plan_windows(3, 2, 2), lambda t: torch.full((len(t), 2), 5e4))
    assert scores.loss == 5e4
    assert perplexity(scores.loss) == math.inf


@pytest.mark.parametrize("stride", [0, -1, 11])
def test_impossible_strides_are_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to the model's sequence length 10"):
        plan_windows(100, 10, stride)


def test_a_stream_of_one_token_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        plan_windows(1, 10, 10)
