"""The noise's own norm ratio, and noise and bounds of parts of the model, against known gradients and all coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from fake_model import Buffers, measured, noise_sd, norms_of, one_process, signal

from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.noise import estimate_noise
from megatron_lion.gradient.norms import GAUSSIAN_RATIO
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.intervals import t_quantile

SHAPES = {"layer_0_bias": (300,), "layer_0_weight": (60, 100), "layer_1_weight": (40, 100), "words_weight": (200, 60)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}  # in the order of their names, as in the sketch
SIZE = sum(SIZES.values())


def places(keep):
    """Which coordinates of a flat gradient belong to the tensors that `keep` accepts, bool [d]."""
    return torch.cat([torch.full((size,), keep(name)) for name, size in SIZES.items()])


def uneven(d, share, generator):
    """Standard deviations [d]: `share` of the coordinates have all the noise."""
    return (torch.rand(d, generator=generator, dtype=torch.float64) < share).double()


@pytest.mark.parametrize("n", [5, 8, 33, 64])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_noise_has_its_own_ratio_and_not_always_the_gaussian_one(n, share):
    """If a share of the coordinates has equal normal noise, r is 0.798 √(share d); ∇f does not matter."""
    generator = torch.Generator().manual_seed(n)
    sd = uneven(4000, share, generator)
    true = GAUSSIAN_RATIO * float(sd.sum() / sd.norm())
    clean = signal("sparse", 4000, generator)
    noise = torch.randn(n, 4000, generator=generator, dtype=torch.float64) * sd * 0.1
    estimate, _ = measured((clean + noise).float())
    assert estimate.norm_ratio_noise == pytest.approx(true, rel=0.04)


def test_the_interval_of_the_noise_ratio_holds_the_truth():
    """200 probes of 12 batches: 95 % intervals with 10 degrees of freedom (11 contrasts) hold 0.798 ‖σ‖₁/‖σ‖₂."""
    generator = torch.Generator().manual_seed(3)
    held = 0
    sd = torch.exp(torch.randn(500, generator=generator, dtype=torch.float64))
    true = GAUSSIAN_RATIO * float(sd.sum() / sd.norm())
    for _ in range(200):
        estimate, _ = measured((1.0 + torch.randn(12, 500, generator=generator, dtype=torch.float64) * sd).float())
        half = t_quantile(10) * estimate.norm_ratio_noise_standard_error
        held += abs(estimate.norm_ratio_noise - true) <= half
    assert 0.90 <= held / 200 <= 0.995


def test_batches_that_count_differently_have_the_noise_of_their_terms():
    """Sums over c terms of unit noise: r is that of the noise, whatever the counts."""
    generator = torch.Generator().manual_seed(5)
    counts = [1, 40, 3, 9, 17, 5, 80, 2]
    sums = [c * 0.3 + math.sqrt(c) * torch.randn(3000, generator=generator, dtype=torch.float64) for c in counts]
    means = torch.stack([total / c for total, c in zip(sums, counts, strict=True)])
    estimate, _ = measured(means.float(), counts)
    assert estimate.norm_ratio_noise == pytest.approx(GAUSSIAN_RATIO * math.sqrt(3000), rel=0.02)


def test_without_noise_there_is_no_ratio_of_the_noise():
    estimate, _ = measured(torch.randn(1, 300).repeat(6, 1))
    assert estimate.norm_ratio_noise is None


def probe_of(monkeypatch, batches, coordinates):
    """Groups and sampled parts of batch gradients [n, d] of a model of several tensors."""
    one_process(monkeypatch)
    model = Buffers(SHAPES)
    sketch = GradientSketch([model], buckets=1 << 20, coordinates=coordinates)
    grouped = GroupedBatches(sketch, len(batches))
    for batch in batches:
        model.fill(batch)
        grouped.add(sketch.local(), 1)
    return grouped.finish([len(batches)])


PARTS = {
    "layer 0": lambda name: name.startswith("layer_0"),
    "without embeddings": lambda name: not name.startswith("words"),
    "words": lambda name: name.startswith("words"),
    "all": lambda name: True,
}


@pytest.mark.parametrize("population", [None, 30])
@pytest.mark.parametrize("n", [7, 40])
def test_a_part_is_estimated_as_if_it_were_the_model(monkeypatch, n, population):
    """All coordinates are kept: every value is that of a probe whose model is this part alone."""
    population = population and max(population, n + 5)
    generator = torch.Generator().manual_seed(0)
    clean = signal("heavy", SIZE, generator)
    batches = clean + noise_sd(0.2, n, SIZE) * torch.randn(n, SIZE, generator=generator, dtype=torch.float64)
    batches = batches.float()
    groups = probe_of(monkeypatch, batches, coordinates=1 << 20)
    for name, keep in PARTS.items():
        own = batches[:, places(keep)]
        norms = norms_of(own.double().mean(0))
        found = estimate_noise(groups.parts.of(keep, norms), norms, batch_samples=8, population=population)
        expected, _ = measured(own, population=population)
        for key, value in vars(expected).items():
            close = value if value is None or isinstance(value, bool) else pytest.approx(value, rel=2e-5)
            assert getattr(found, key) == close, (name, key)


def test_sampled_coordinates_give_bounds_within_their_errors(monkeypatch):
    """A tenth of the coordinates; three rows of the embedding have nearly all of its energy."""
    generator = torch.Generator().manual_seed(1)
    clean, n = signal("heavy", SIZE, generator), 16
    clean[-3 * 60 :] *= 20
    held = dict.fromkeys(PARTS, 0)
    for _ in range(40):
        batches = clean + noise_sd(0.2, n, SIZE) * torch.randn(n, SIZE, generator=generator, dtype=torch.float64)
        groups = probe_of(monkeypatch, batches.float(), coordinates=SIZE // 10)
        for name, keep in PARTS.items():
            part = clean[places(keep)]
            norms = norms_of(batches[:, places(keep)].mean(0))
            found = estimate_noise(groups.parts.of(keep, norms), norms, batch_samples=8)
            quantile, true = t_quantile(found.num_groups - 1), float(part.abs().sum() / part.norm())
            low = found.norm_ratio_low - quantile * found.norm_ratio_low_standard_error
            high = found.norm_ratio_high + quantile * found.norm_ratio_high_standard_error
            held[name] += low <= true <= high
            assert found.sketch_error > 0, "the error of the sample must be stated"
    assert min(held.values()) >= 36, held


def test_the_error_of_the_sample_covers_its_scatter(monkeypatch):
    """The same batches, 40 other samples of the coordinates: σ² of a part scatters as stated, within a factor of 2."""
    generator = torch.Generator().manual_seed(2)
    sd = torch.exp(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    batches = 1.0 + sd * torch.randn(12, SIZE, generator=generator, dtype=torch.float64)
    values, stated = [], []
    own = batches[:, places(PARTS["words"])]
    norms = norms_of(own.mean(0))
    for _ in range(40):
        order = torch.randperm(SIZES["words_weight"], generator=generator) + SIZE - SIZES["words_weight"]
        shuffled = torch.cat([batches[:, : SIZE - len(order)], batches[:, order]], dim=1)
        groups = probe_of(monkeypatch, shuffled.float(), coordinates=SIZE // 10)
        found = estimate_noise(groups.parts.of(PARTS["words"], norms), norms, batch_samples=8)
        values.append(found.noise_variance)
        stated.append(found.sketch_error)
    spread = float(torch.tensor(values).std() / torch.tensor(values).mean())
    assert 0.5 * spread < sum(stated) / 40 < 2 * spread


def test_the_noise_is_a_share_of_the_exact_norm_and_not_a_sum_over_the_sample(monkeypatch):
    """Energy and noise are in few coordinates: a sum over a tenth of them would be off by a factor; the share is not."""
    generator = torch.Generator().manual_seed(4)
    clean, n = torch.exp(1.2 * torch.randn(SIZE, generator=generator, dtype=torch.float64)), 64
    batches = clean * (1 + 0.1 * torch.randn(n, SIZE, generator=generator, dtype=torch.float64))
    sampled = 0.0
    for name, keep in PARTS.items():
        own = batches[:, places(keep)]
        norms = norms_of(own.mean(0))
        groups = probe_of(monkeypatch, batches.float(), coordinates=SIZE // 10)
        found = estimate_noise(groups.parts.of(keep, norms), norms, batch_samples=8)
        exact = float((own - own.mean(0)).square().sum()) / (n - 1)
        assert found.noise_variance == pytest.approx(exact, rel=0.2), name
        table = groups.parts.groups
        part = torch.tensor([keep(tensor) for tensor in groups.parts.names])
        sampled = max(sampled, abs(float(table.squares_PS[part].sum()) / n**2 / norms.grad_l2**2 - 1))
    assert sampled > 0.25, "the sample's own norm must be far from the exact one"
