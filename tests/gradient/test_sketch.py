"""The sketch of a gradient: unbiased, of known error for any gradient, exact for a small model, the same at every layout."""

from __future__ import annotations

import math

import pytest
import torch
from distributed import run_distributed
from fake_model import Buffers, one_process
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import probe_config
from properties import examples
from tiny import opened_run
from tiny_bert import tiny_bert, write_bert_corpus

from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.sketch import GradientSketch, _hashed_pieces, _spread

SHAPES = {"embedding": (400, 48), "layer.weight": (48, 192), "layer.bias": (192,), "norm": (48,)}
SIZE = 400 * 48 + 48 * 192 + 192 + 48


def sketched(monkeypatch, gradient, draw, buckets=512, coordinates=2000):
    """Sketch of a gradient [d]; the hash depends on the tensors' names, so `draw` selects one."""
    one_process(monkeypatch)
    model = Buffers({f"{name.replace('.', '_')}{draw}": shape for name, shape in SHAPES.items()})
    model.fill(gradient)
    sketch = GradientSketch([model], buckets, coordinates)
    return sketch, sketch.local()


def gradients(kind):
    """Dense; three rows of the embedding have nearly all the energy; one outlier column in every row; or blocks alike."""
    generator = torch.Generator().manual_seed(4)
    gradient = torch.randn(SIZE, generator=generator)
    if kind == "rows":
        gradient[: 3 * 48] *= 300
    if kind == "column":
        gradient[: 400 * 48].view(400, 48)[:, 7] = 50.0
    if kind == "ones":
        gradient.fill_(1.0)
    if kind == "coherent":  # every row is the same
        gradient[: 400 * 48] = (10 * torch.randn(48, generator=generator)).repeat(400)
    return gradient


@pytest.mark.parametrize("kind", ["dense", "rows", "column", "coherent", "ones"])
def test_squares_and_products_are_unbiased_with_the_stated_error(monkeypatch, kind):
    first = gradients(kind)
    second = first + 0.5 * gradients("dense").roll(1)
    squares, products = [], []
    for draw in range(150):
        sketch, vector = sketched(monkeypatch, first, draw)
        _, other = sketched(monkeypatch, second, draw)
        squares.append(float(sketch.squares(vector)))
        products.append(float(vector[: sketch.num_buckets].double() @ other[: sketch.num_buckets].double()))
    assert sketch.relative_error == pytest.approx(2 / math.sqrt(512))
    for found, truth, norms in (
        (squares, float(first.double().square().sum()), float(first.double().square().sum())),
        (products, float(first.double() @ second.double()), float(first.double().norm() * second.double().norm())),
    ):
        values = torch.tensor(found, dtype=torch.float64)
        assert abs(float(values.mean()) - truth) < 4 * sketch.relative_error * norms / math.sqrt(150)
        assert float(values.std()) < 1.15 * sketch.relative_error * norms


def test_blocks_that_share_an_offset_have_signs_of_their_own(monkeypatch):
    """With 16 buckets, 1,800 blocks share 16 offsets: without a sign for each, equal rows would add up."""
    gradient = gradients("coherent")
    truth = float(gradient.double().square().sum())
    found = []
    for draw in range(30):
        sketch, vector = sketched(monkeypatch, gradient, draw, buckets=16)
        found.append(float(sketch.squares(vector)) / truth)
    assert sum(found) / 30 == pytest.approx(1.0, abs=0.4)


def test_sampled_l1_is_near_for_every_shape(monkeypatch):
    for kind in ("dense", "rows", "column"):
        gradient = gradients(kind)
        sketch, vector = sketched(monkeypatch, gradient, 0, coordinates=8000)
        assert float(sketch.l1(vector)) == pytest.approx(float(gradient.abs().sum()), rel=0.08), kind


def test_a_small_model_is_kept_whole(monkeypatch):
    gradient = gradients("rows")
    sketch, vector = sketched(monkeypatch, gradient, 0, buckets=SIZE, coordinates=SIZE)
    assert sketch.is_exact
    assert sketch.relative_error == 0.0
    assert float(sketch.squares(vector)) == pytest.approx(float(gradient.double().square().sum()), rel=1e-12)
    assert float(sketch.l1(vector)) == pytest.approx(float(gradient.double().abs().sum()), rel=1e-6)


def test_the_sketch_is_linear(monkeypatch):
    one, two = gradients("rows"), gradients("column")
    _, a = sketched(monkeypatch, one, 0)
    _, b = sketched(monkeypatch, two, 0)
    _, both = sketched(monkeypatch, one + two, 0)
    assert torch.allclose(a + b, both, rtol=1e-5, atol=1e-2)


@given(numel=st.integers(1, 5000), start=st.integers(0, 5000), buckets=st.integers(1, 700), cut=st.floats(0.0, 1.0))
@examples(100)
def test_pieces_of_two_ranks_are_those_of_the_whole_tensor(numel, start, buckets, cut):
    """Each coordinate has one bucket and one sign, whichever rank holds it."""

    def places(first, count):
        found = {}
        for piece in _hashed_pieces("name", 0, first, count, buckets):
            for step in range(piece.length):
                found[first + piece.start + step] = (piece.bucket + step, piece.sign_from + step, piece.sign)
        return found

    here = int(numel * cut)
    whole = places(start, numel)
    assert sorted(whole) == list(range(start, start + numel))
    assert all(0 <= bucket < buckets and place % buckets == sign for place, (bucket, sign, _) in whole.items())
    assert places(start, here) | places(start + here, numel - here) == whole


@given(numel=st.integers(1, 3000), share=st.floats(0.001, 1.0), key=st.text(max_size=3))
@examples(100)
def test_sampled_coordinates_lie_one_in_each_of_equal_intervals(numel, share, key):
    count = max(1, int(numel * share))
    index = _spread(numel, count, key).tolist()
    for number, place in enumerate(index):
        # Interval `number` is [number, number + 1) · numel / count; in whole numbers, so that nothing is rounded.
        assert number * numel <= (place + 1) * count - 1
        assert place * count < (number + 1) * numel
    assert _spread(numel, numel, key).tolist() == list(range(numel))
    assert _spread(numel, count, key).tolist() == index


@pytest.mark.parametrize("n", [1, 2, 5, 31, 32, 33, 64, 100, 150])
def test_groups_are_the_sums_of_their_batches(monkeypatch, n):
    """Every group of 2^level batches occurs once, kept groups partition all batches, and the memory stays bounded."""
    from fake_model import Whole

    generator = torch.Generator().manual_seed(n)
    batches = torch.randn(n, 30, generator=generator).double()  # sums of two are exact
    grouped = GroupedBatches(Whole(30), n)
    for batch in batches:
        grouped.add(batch.clone(), 2)
    found = grouped.finish([n])
    assert len(grouped._kept) <= 32
    sizes = found.prefixes[n].group_sizes
    assert sum(sizes) == (n if n > 1 else 0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    for start, size, part in zip(starts, sizes, found.prefixes[n].without, strict=True):
        rest = torch.cat([batches[:start], batches[start + size :]])
        mean = rest.sum(0) / (2 * len(rest))
        assert part.squares == pytest.approx(float(mean.square().sum()))
        assert part.l1 == pytest.approx(float(mean.abs().sum()))
        assert part.scatter == pytest.approx(float(rest.square().sum() / 2))
    folds = found.folds
    assert len(folds.without) == (min(n, 8) if n > 1 else 0)
    assert max(folds.group_sizes, default=0) <= min(folds.group_sizes, default=0) + max(1, n // 8)
    starts = [sum(folds.group_sizes[:number]) for number in range(len(folds.without))]
    parts = [batches[start : start + size].sum(0) for start, size in zip(starts, folds.group_sizes, strict=True)]

    def aligned(parts):  # ⟨sign of the other groups' sum, sum of this group⟩
        whole = sum(parts)
        return [float(((whole - part).sign() * part).sum()) for part in parts]

    counts = [2 * size for size in folds.group_sizes]
    expected = [value / count for value, count in zip(aligned(parts), counts, strict=True)]
    if n > 1:
        assert folds.aligned_by_group == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert folds.aligned == pytest.approx(sum(aligned(parts)) / (2 * n), rel=1e-4, abs=1e-5)
    for number, part in enumerate(folds.without):
        others = aligned(parts[:number] + parts[number + 1 :])
        assert part.aligned == pytest.approx(sum(others) / part.count, rel=1e-4, abs=1e-5)
    for level, ratios in found.ratios.items():
        size = 1 << level
        sums = [batches[start : start + size].sum(0) for start in range(0, n - size + 1, size)]
        assert ratios == pytest.approx([float(s.abs().sum() / s.norm()) for s in sums]), level


LARGE = {"probe__num_batches": 4, "model__hidden_size": 256, "train__micro_batch_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
TP2_PP2_SP = {**PP2, "parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
TP2_SP = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}


def probe_each(rank, configs):
    """Work of one process: probes of models of 1.6 million parameters."""
    from megatron_lion.gradient.full_gradient import probe_run

    found = {}
    for name, config in configs.items():
        with opened_run(config) as run:
            result = probe_run(run).as_dict()
            found[name] = {key: result[key] for key in ("noise", "ladder", "all", "noise_by_part")}
    return found


def compare(found, expected):
    assert expected["noise"]["sketch_error"] > 0, "the model must be larger than the sketch"
    assert expected["all"]["num_parameters"] > 4 * 2**18
    for part, other in zip([found["noise"], *found["ladder"]], [expected["noise"], *expected["ladder"]], strict=True):
        for key, value in other.items():
            assert part[key] == (value if value is None else pytest.approx(value, rel=2e-3)), key
    parts = expected["noise_by_part"]
    assert {"embedding", "attention", "MLP", "norm", "bias"} <= set(parts["kinds"])
    for block in ("layers", "kinds"):
        assert found["noise_by_part"][block].keys() == parts[block].keys()
    for part, other in (
        (found["noise_by_part"]["without_embeddings"], parts["without_embeddings"]),
        *((found["noise_by_part"]["layers"][name], other) for name, other in parts["layers"].items()),
        *((found["noise_by_part"]["kinds"][name], other) for name, other in parts["kinds"].items()),
    ):
        for key, value in other.items():
            assert part[key] == (value if value is None else pytest.approx(value, rel=5e-3)), key


@pytest.mark.parametrize(
    ("size", "layouts", "kinds"),
    [
        pytest.param(2, {"PP2": PP2}, ["gpt2"], id="GPT-2 PP2"),
        pytest.param(2, {"PP2": PP2, "TP2 SP": TP2_SP, "DP2": {}}, ["gpt2", "bert"], id="two", marks=pytest.mark.slow),
        pytest.param(4, {"TP2xPP2 SP": TP2_PP2_SP}, ["gpt2", "bert"], id="four", marks=pytest.mark.slow),
    ],
)
def test_a_model_larger_than_the_sketch_has_the_same_noise_figures_at_every_layout(
    tmp_path, corpus, size, layouts, kinds
):
    """GPT-2 and BERT with more than 2^18 parameters on each stage."""
    text = write_bert_corpus(tmp_path / "bert") if "bert" in kinds else None

    def config(kind, name, changes):
        folder, settings = tmp_path / f"{kind} {name}", {**LARGE, **changes}
        if kind == "bert":
            return tiny_bert(folder, text, probe__every=1, **settings)
        return probe_config(folder, corpus, **settings)

    def configs(layouts):
        return {f"{kind} {name}": config(kind, name, changes) for kind in kinds for name, changes in layouts.items()}

    expected = run_distributed(probe_each, 1, configs({"one": {}}))[0]
    found = run_distributed(probe_each, size, configs(layouts))[0]
    for name in layouts:
        for kind in kinds:
            compare(found[f"{kind} {name}"], expected[f"{kind} one"])
