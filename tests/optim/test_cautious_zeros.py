"""Cautious LION: elements whose sign times gradient is exactly 0 do not move and do not count as agreeing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits, tensor

from megatron_lion.optim import cautious
from megatron_lion.optim import kernel_launch as launch
from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
LR = 0.125
ZEROS = (0.0, -0.0)
# β1 = ½, so that g = -m interpolates to exactly 0.
BETAS = (0.5, 0.75)
# Pairs of gradient and momentum: zero gradients, zero interpolations, both, and zeros of either sign.
STILL = [(g, m) for g in ZEROS for m in (3.0, -3.0, *ZEROS)] + [(2.0, -2.0), (-2.0, 2.0), (1e-40, -1e-40)]
AGREE = [(1.0, 0.0), (-1.0, -0.0), (2.0, 1.0), (-2.0, -5.0), (3.0, -1.0)]
DISAGREE = [(1.0, -2.0), (-1.0, 4.0)]


def stepped(implementation, pairs, starts, weight_decay=0.0, **settings):
    """Returns the parameter after a step over (gradient, momentum) pairs, and the optimizer."""
    param = torch.nn.Parameter(tensor(starts))
    hyper = {"lr": LR, "betas": BETAS, "weight_decay": weight_decay}
    optimizer = Lion([param], cautious=True, implementation=implementation, **hyper, **settings)
    optimizer.init_state()
    optimizer.state[param]["exp_avg"].copy_(tensor([m for _, m in pairs]))
    param.grad = tensor([g for g, _ in pairs])
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("repeats", [1, 80])  # 80: more elements than a program of the kernel has
def test_an_element_whose_product_is_0_stays_and_does_not_count(implementation, repeats):
    pairs = (STILL + AGREE + DISAGREE) * repeats
    starts = [(0.0, -0.0, 1.0)[number % 3] for number in range(len(pairs))]
    param, _ = stepped(implementation, pairs, starts)
    phi = np.float32(1 / (len(AGREE) * repeats / len(pairs)))
    expected = np.array(starts, np.float32)
    for index, (pair, start) in enumerate(zip(pairs, starts, strict=True)):
        if pair in AGREE:
            expected[index] = np.float32(start) - np.float32(np.sign(pair[0])) * phi * np.float32(LR)
    assert torch.equal(param.detach().cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pair", STILL, ids=str)
def test_where_every_product_is_0_only_the_decay_remains(implementation, pair):
    start = [1.0, -2.0, 0.5]
    still, optimizer = stepped(implementation, [pair] * 3, start)
    assert still.tolist() == start
    momentum = np.float32(pair[1]) * np.float32(0.75) + np.float32(pair[0]) * np.float32(0.25)
    assert optimizer.state[still]["exp_avg"].cpu().numpy().tolist() == [momentum] * 3
    decayed, _ = stepped(implementation, [pair] * 3, start, weight_decay=0.5)
    assert decayed.tolist() == [value * (1 - 0.5 * LR) for value in start]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_zeros_of_either_sign_come_out_alike_bit_for_bit(weight_decay):
    cases = [(start, pair) for start, pair in itertools.product((*ZEROS, 1.0, -1.0), STILL + AGREE + DISAGREE)]
    pairs, starts = [pair for _, pair in cases], [start for start, _ in cases]
    param, optimizer = stepped("reference", pairs, starts, weight_decay)
    for implementation in IMPLEMENTATIONS[1:]:
        other, others = stepped(implementation, pairs, starts, weight_decay)
        assert same_bits(other.detach(), param.detach()), implementation
        assert same_bits(others.state[other]["exp_avg"], optimizer.state[param]["exp_avg"]), implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [(5,), (33, 1, 1025), (1024, 31)])
def test_counts_are_those_of_the_strictly_positive_products(implementation, lengths, monkeypatch):
    """Each parameter has its own count, also if it does not fill a program of the kernel."""
    seen = []
    factors = cautious.factors

    def note(params, counts, numels, sum_agreement):
        seen.append((counts.tolist(), numels.tolist()))
        return factors(params, counts, numels, sum_agreement)

    monkeypatch.setattr(cautious, "factors", note)
    monkeypatch.setattr(launch, "factors", note)
    rng = np.random.default_rng(1)
    params, expected = [], []
    for length in lengths:
        pairs = [(STILL + AGREE + DISAGREE)[number] for number in rng.integers(0, 18, length)]
        params.append(torch.nn.Parameter(torch.ones(length, device=DEVICE)))
        params[-1].grad = tensor([g for g, _ in pairs])
        expected.append((sum(pair in AGREE for pair in pairs), tensor([m for _, m in pairs])))
    optimizer = Lion(params, cautious=True, implementation=implementation, betas=BETAS)
    optimizer.init_state()
    for param, (_, momentum) in zip(params, expected, strict=True):
        optimizer.state[param]["exp_avg"].copy_(momentum)
    optimizer.step()
    assert seen == [([count for count, _ in expected], list(lengths))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_smallest_mean_bounds_the_factor(implementation):
    """One of 4,000 agrees: φ is 1,000 and not 4,000."""
    pairs = [(1.0, 0.0)] + [(0.0, 1.0)] * 3999
    param, _ = stepped(implementation, pairs, [0.0] * 4000)
    assert param[0].item() == -1000 * LR
    assert not param[1:].any()
