"""Sharded full gradient, ladder and noise against a float64 single-process reference, at every layout."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from distributed import fits, run_distributed, skip_unless_fits
from gradient.plain_gpt2 import loss_sum
from tiny import LAYOUTS, VOCAB, opened_run, run_all, tiny_config, write_corpus

BATCHES, BATCH, WEIGHT_DECAY = 5, 8, 30.0  # some initial weights exceed 1/30, so the edge of the box is tested

CASES = {
    **LAYOUTS,
    "TP2 SP": (2, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}),
    "TP2xDP2 SP": (4, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}),
    "DP2 overlapped": (2, {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}),
    "DP2 overlapped, added by the product": (
        2,
        {"parallel__overlap_grad_reduce": True, "train__gradient_accumulation_fusion": True},
    ),
    "TP2xPP2 SP, added by the product": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
            "train__gradient_accumulation_fusion": True,
        },
    ),
    "DP2 not sharded": (2, {"parallel__use_distributed_optimizer": False}),
    "TP2xPP2 SP": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
        },
    ),
}


def make_config(folder, corpus, **changes):
    settings = {
        "probe__every": 1,
        "probe__num_batches": BATCHES,
        "optimizer__weight_decay": WEIGHT_DECAY,
        "model__hidden_dropout": 0.3,  # must be off in the probe
        "model__attention_dropout": 0.3,
        **changes,
    }
    return tiny_config(folder, corpus, **settings)


def probe_each(rank, configs):
    """Work of one process: probes at each layout; returns the results and whether the weights changed."""
    from megatron_lion.gradient.full_gradient import probe_run

    results = {}
    for name, config in configs.items():
        with opened_run(config) as run:
            before = [parameter.detach().clone() for parameter in run.model[0].parameters()]
            result = probe_run(run).as_dict()
            result["frozen"] = all(map(torch.equal, before, run.model[0].parameters()))
            result["buffers zero"] = all(not bool(buffer.grad_data.any()) for buffer in run.model[0].buffers)
            result["training"] = all(module.training for module in run.model[0].modules())
            results[name] = result
    return results


def reference_gradients(rank, config):
    """Returns weights by name and the summed float64 gradient of each batch, for the samples that the probe reads."""
    from megatron_lion.optim.parameter_shards import named_global_parameters

    with opened_run(config) as run:
        weights = {
            name: parameter.detach().double().clone().requires_grad_()
            for name, parameter in named_global_parameters(run.model[0])
        }
        samples = run.probe_samples.at(0)
        batches = []
        for batch in range(BATCHES):
            items = [samples[index] for index in range(batch * BATCH, (batch + 1) * BATCH)]
            tokens, labels = (torch.stack([item[key] for item in items]) for key in ("tokens", "labels"))
            loss = loss_sum(weights, tokens, labels, num_layers=2, num_heads=4)
            batches.append((float(loss.detach()), torch.autograd.grad(loss, list(weights.values()))))
        return {"weights": {name: value.detach() for name, value in weights.items()}, "batches": batches}


@pytest.fixture(scope="module")
def results(tmp_path_factory, device):
    """Probes of the cases that fit on the device, and the float64 gradients, always from a run on the CPU."""
    folder = tmp_path_factory.mktemp(f"layouts-{device}")
    corpus = write_corpus(folder / "corpus", documents=200)
    configs = {
        name: (size, make_config(folder / name, corpus, device=device, **changes))
        for name, (size, changes) in CASES.items()
        if fits(device, size)
    }
    found = run_all(configs, probe_each, device)
    found["reference"] = run_distributed(reference_gradients, 1, make_config(folder / "reference", corpus))[0]
    return found


TOKENS = BATCH * 16


class Reference:
    """Norms by definition, from the flat float64 gradients of the batches."""

    def __init__(self, raw):
        self.weights = raw["weights"]
        self.losses = [loss / TOKENS for loss, _ in raw["batches"]]
        self.grads = [
            {name: grad / TOKENS for name, grad in zip(self.weights, grads, strict=True)} for _, grads in raw["batches"]
        ]

    def mean(self, batches):
        return {name: sum(self.grads[b][name] for b in batches) / len(batches) for name in self.weights}

    def norms(self, keep=lambda name: True, rows=None, batches=range(BATCHES)):
        """Norms over the parameters that `keep` accepts; `rows` cuts the vocabulary."""
        grad = self.mean(list(batches))
        cut = {name: slice(None) for name in grad if keep(name)}
        if "embedding.word_embeddings.weight" in cut:
            cut["embedding.word_embeddings.weight"] = rows or slice(None)
        g = torch.cat([grad[name][part].flatten() for name, part in cut.items()])
        theta = torch.cat([self.weights[name][part].flatten() for name, part in cut.items()])
        decay = torch.cat(
            [
                torch.full_like(grad[name][part].flatten(), WEIGHT_DECAY if grad[name].dim() > 1 else 0.0)
                for name, part in cut.items()
            ]
        )
        decayed = decay > 0
        return {
            "grad_l1": float(g.abs().sum()),
            "grad_l2": float(g.norm()),
            "grad_linf": float(g.abs().max()),
            "grad_dot_theta": float(g @ theta),
            "kkt_residual": float((decay * g * theta + g.abs()).sum()) if decayed.any() else None,
            "theta_linf": float(theta.abs().max()),
            "box_fraction": float((theta.abs() >= 0.99 / WEIGHT_DECAY)[decayed].double().mean())
            if decayed.any()
            else None,
            "num_parameters": g.numel(),
            "norm_ratio": float(g.abs().sum() / g.norm()),
            "norm_ratio_over_sqrt_d": float(g.abs().sum() / g.norm() / math.sqrt(g.numel())),
        }


@pytest.fixture(scope="module")
def reference(results):
    return Reference(results["reference"])


@pytest.fixture
def looser(device):
    """Factor by which a comparison with float64 is looser than on the CPU.

    CUDA's memory-efficient attention multiplies fp32 numbers as sums of TF32 parts, exact to about 2^-21 instead of
    2^-24: a factor of 8. The rest covers other orders of summation and the compiled fusions of bias, GELU and dropout.
    """
    return 1 if device == "cpu" else 10


def case_of(results, case, device):
    """The result of a case; skips the test if the case needs more devices than there are."""
    skip_unless_fits(device, CASES[case][0])
    return results[case]


def assert_close(found, expected, where, relative=1e-6):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None or key == "num_parameters":
            assert found[key] == value, (where, key)
        else:
            # ⟨∇f, θ⟩ is a difference of large sums: its error is measured relative to their size
            size = expected["grad_l1"] * expected["theta_linf"] if key == "grad_dot_theta" else abs(value)
            assert abs(found[key] - value) <= relative * size + 1e-12, (where, key, found[key], value)


@pytest.mark.parametrize("case", CASES)
def test_norms_equal_float64_reference(results, reference, device, looser, case):
    found = case_of(results, case, device)
    relative = looser * 1e-6
    assert found["loss"] == pytest.approx(sum(reference.losses) / BATCHES, rel=relative)
    assert_close(found["all"], reference.norms(), case, relative)
    assert_close(found["without_padding"], reference.norms(rows=slice(0, VOCAB)), case, relative)
    assert_close(found["without_embeddings"], reference.norms(lambda name: "embedding" not in name), case, relative)
    assert found["without_padding"]["num_parameters"] == found["all"]["num_parameters"] - (128 - VOCAB) * 32


@pytest.mark.parametrize("case", CASES)
def test_layers_kinds_and_parameters_equal_reference(results, reference, device, looser, case):
    found = case_of(results, case, device)
    relative = looser * 1e-6
    assert list(found["layers"]) == ["embedding", "layer 0", "layer 1", "final norm"]
    for index in (0, 1):
        expected = reference.norms(lambda name, index=index: f"layers.{index}." in name)
        assert_close(found["layers"][f"layer {index}"], expected, (case, index), relative)
    kinds = {
        "embedding": lambda name: name.startswith("embedding"),
        "attention": lambda name: "attention" in name and name.endswith("weight"),
        "MLP": lambda name: "mlp.linear" in name and name.endswith("weight"),
        "norm": lambda name: "layernorm" in name,
        "bias": lambda name: "layernorm" not in name and name.endswith("bias"),
    }
    assert set(found["kinds"]) == set(kinds)
    for kind, keep in kinds.items():
        assert_close(found["kinds"][kind], reference.norms(keep), (case, kind), relative)
    assert found["kinds"]["norm"]["kkt_residual"] is None  # exempt from decay: no box for them
    padding = reference.norms(lambda name: "word" in name, rows=slice(VOCAB, None))
    assert_close(found["parameters"]["embedding.word_embeddings.weight#padding"], padding, case, relative)
    names = {name for name in found["parameters"] if "#" not in name}
    assert names == set(reference.weights)


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes(results, device, case):
    found = case_of(results, case, device)
    assert found["frozen"]
    assert found["buffers zero"]
    assert found["training"]


def jackknife(reference, batches):
    """Standard error of r over `batches`, from r without each of them."""
    n = len(batches)
    without = [reference.norms(batches=[b for b in batches if b != out])["norm_ratio"] for out in batches]
    center = statistics.fmean(without)
    return math.sqrt((n - 1) / n * sum((value - center) ** 2 for value in without))


@pytest.mark.parametrize("case", CASES)
def test_ladder_and_noise_equal_definitions(results, reference, device, looser, case):
    found = case_of(results, case, device)
    assert [rung["num_batches"] for rung in found["ladder"]] == [1, 2, 4, 5]
    for rung in found["ladder"]:
        k = rung["num_batches"]
        expected = reference.norms(batches=range(k))
        for key in ("grad_l1", "grad_l2", "norm_ratio", "norm_ratio_over_sqrt_d"):
            assert rung[key] == pytest.approx(expected[key], rel=looser * 1e-6), (case, k)
        ratio = [reference.norms(batches=[batch])["norm_ratio"] for batch in range(BATCHES)]
        if k == 1:  # five single batches
            assert rung["num_groups"] == 5
            expected_error = statistics.stdev(ratio) / statistics.fmean(ratio) * rung["norm_ratio"]
        elif k == 4:  # leaving out one batch of the first four
            assert rung["num_groups"] == 4
            expected_error = jackknife(reference, range(4))
        elif k == 5:
            assert rung["num_groups"] == 5
            expected_error = jackknife(reference, range(5))
        else:  # two pairs are too few
            assert rung["norm_ratio_standard_error"] is None
            continue
        unread = 1 - k * BATCH / found["population_samples"]
        assert rung["norm_ratio_standard_error"] == pytest.approx(expected_error * math.sqrt(unread), rel=looser * 1e-3)
    flat = torch.stack([torch.cat([value.flatten() for value in grad.values()]) for grad in reference.grads])
    center = flat.mean(0)
    variance = float((flat - center).square().sum() / (BATCHES - 1))  # the unbiased sample variance, summed
    noise = found["noise"]
    assert noise["sketch_error"] == 0.0
    left = variance * (1 / BATCHES - BATCH / found["population_samples"])
    assert noise["noise_variance"] == pytest.approx(variance, rel=looser * 1e-4)
    assert noise["signal_l2_squared"] == pytest.approx(float(center.square().sum()) - left, rel=looser * 1e-4)
    assert noise["noise_share"] == pytest.approx(left / float(center.square().sum()), rel=looser * 1e-4)
    assert noise["grad_l2_corrected"] == pytest.approx(math.sqrt(noise["signal_l2_squared"]))
    assert noise["noise_scale_samples"] == pytest.approx(
        variance / noise["signal_l2_squared"] * BATCH, rel=looser * 1e-4
    )


@pytest.mark.parametrize("case", CASES)
def test_noise_of_parts_equals_definitions(results, reference, device, looser, case):
    """Noise share and lower bound of each part, from the float64 gradients of the five batches."""
    found = case_of(results, case, device)
    known = BATCHES * BATCH / found["population_samples"]
    parts = {
        "without_embeddings": lambda name: "embedding" not in name,
        "embedding": lambda name: name.startswith("embedding"),
        "MLP": lambda name: "mlp.linear" in name and name.endswith("weight"),
        "layer 1": lambda name: "layers.1." in name,
    }
    for part, keep in parts.items():
        block = found["noise_by_part"]
        block = block if part in block else block["layers"] if part in block["layers"] else block["kinds"]
        flat = torch.stack([
            torch.cat([value.flatten() for name, value in grad.items() if keep(name)]) for grad in reference.grads
        ])  # fmt: skip
        center = flat.mean(0)
        variance = float((flat - center).square().sum() / (BATCHES - 1))
        left = variance * (1 - known) / BATCHES
        assert block[part]["num_parameters"] == flat.shape[1]
        assert block[part]["noise_share"] == pytest.approx(left / float(center.square().sum()), rel=looser * 1e-4)
        below, unread = 0.0, known * (BATCHES - 1) / BATCHES
        for out in range(BATCHES):
            rest = (flat.sum(0) - flat[out]) / (BATCHES - 1)
            below += float((1 - unread) * rest.sign() @ flat[out] + unread * rest.abs().sum()) / BATCHES
        if block[part]["is_resolved"]:
            low = max(1.0, below / math.sqrt(float(center.square().sum()) - left))
            assert block[part]["norm_ratio_low"] == pytest.approx(low, rel=looser * 1e-3), part
        # Of a batch minus the mean of all five, 4/5 of the variance is left.
        l1 = float((flat - center).abs().sum(1).mean()) / math.sqrt(1 - 1 / BATCHES)
        assert block[part]["norm_ratio_noise"] == pytest.approx(l1 / math.sqrt(variance), rel=0.1), part
    kinds = found["noise_by_part"]["kinds"]
    assert any(part["is_resolved"] for part in kinds.values())
