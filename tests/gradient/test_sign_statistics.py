"""Sign statistics of LION's update direction: brute force on one process, the same at every layout, and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_distributed
from tiny import LAYOUTS, opened_run, step_once, tiny_config, write_corpus

from megatron_lion.gradient.sign_statistics import KEY_BIAS, SignStatistics, SignTable
from megatron_lion.intervals import t_quantile

BATCHES = 8
CASES = {name: LAYOUTS[name] for name in ("DP2", "TP2", "PP2") if name in LAYOUTS} | {
    "bf16 momentum": (1, {"train__precision": "bf16", "optimizer__momentum_dtype": "bf16"})
}


@dataclass
class FakeShard:
    """A whole parameter on one process."""

    name: str
    main: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    start: int = 0


def config_of(folder, corpus, **changes):
    return tiny_config(
        folder, corpus,
        **{"probe__every": 1, "probe__num_batches": BATCHES, "optimizer__clip_grad": 0.3, "optimizer__lr": 2e-2, **changes},
    )  # fmt: skip


def signs_after_three_steps(rank, configs):
    """Work of one process: trains three steps and probes; the first case also returns what brute force needs."""
    from megatron_lion.gradient.accumulate import FullGradient
    from megatron_lion.gradient.full_gradient import probe_run
    from megatron_lion.optim.parameter_shards import local_shards

    found = {}
    for name, config in configs.items():
        with opened_run(config) as run:
            batches = run.train_batches()
            for _ in range(3):
                step_once(run, batches)
            result = probe_run(run).as_dict()
            found[name] = {key: result[key] for key in ("signs", "all", "noise", "kinds", "population_samples")}
            if name != "one":
                continue
            shards = list(local_shards(run.model, run.optimizer))
            momenta = {shard.name: shard.state["exp_avg"].double().clone() for shard in shards}
            theta = {shard.name: shard.main.detach().double().clone() for shard in shards}
            grads = []
            samples = run.probe_batches()
            with FullGradient(
                run.model, run.optimizer, run.forward_step, run.ranks, num_microbatches=config.num_microbatches(1),
                micro_batch_size=config.micro_batch_size, seq_length=16, vocab_size=run.corpora.vocab_size,
            ) as full:  # fmt: skip
                for _ in range(BATCHES):
                    full.add(samples)
                    table = full.read()
                    grads.append({s.name: s.grad.double().clone() * table.scale for s in full.shards()})
            found["raw"] = {"momenta": momenta, "theta": theta, "means": grads}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signs")
    corpus = write_corpus(folder / "corpus", documents=200)
    found = run_distributed(signs_after_three_steps, 1, {"one": config_of(folder / "one", corpus)})[0]
    by_size = {}
    for name, (size, changes) in CASES.items():
        by_size.setdefault(size, {})[name] = config_of(folder / name, corpus, **changes)
    for size, configs in by_size.items():
        found |= run_distributed(signs_after_three_steps, size, configs)[0]
    return found


def flat(tensors):
    return np.concatenate([tensors[name].numpy().ravel() for name in sorted(tensors)])


def test_values_equal_brute_force(results):
    found, raw = results["one"]["signs"], results["raw"]
    beta1, beta2 = 0.9, 0.95
    means = [flat(mean) for mean in raw["means"]]
    single = [means[0]] + [(k + 1) * means[k] - k * means[k - 1] for k in range(1, BATCHES)]
    clip = min(1.0, 0.3 / (np.linalg.norm(means[0]) + 1e-6))
    assert clip < 1, "clipping must be active in this test"
    assert found["clip_factor"] == pytest.approx(clip, rel=1e-5)
    m = flat(raw["momenta"])
    c = beta1 * m + (1 - beta1) * clip * single[0]
    after = beta1 * (beta2 * m + (1 - beta2) * clip * single[0]) + (1 - beta1) * clip * single[1]
    products = [float(np.sign(c) @ g) for g in single]
    known = 8 / results["one"]["population_samples"]
    block = found["all"]
    descent = (1 - known) * float(np.mean(products[1:])) + known * products[0]
    assert block["descent"] == pytest.approx(descent, rel=1e-4)
    assert block["agreement_share"] == pytest.approx(float(np.mean(c * means[-1] > 0)), abs=2e-4)
    assert block["flip_share"] == pytest.approx(float(np.mean(c * after < 0)), abs=2e-4)
    assert block["zero_share"] == pytest.approx(float(np.mean(c == 0)), abs=2e-4)
    assert block["direction_error_l1"] == pytest.approx(float(np.abs(c - means[-1]).sum()), rel=1e-4)
    assert block["grad_l1"] == pytest.approx(results["one"]["all"]["grad_l1"], rel=1e-6)
    assert block["num_parameters"] == results["one"]["all"]["num_parameters"]


def test_the_loss_is_within_what_the_proof_bounds(results):
    """‖∇f‖₁ − ⟨∇f, sign(c)⟩ ≤ 2 ‖c − ∇f‖₁, here with ḡ for ∇f, and the bounds enclose one another."""
    for name, result in results.items():
        if name == "raw":
            continue
        block = result["signs"]["all"]
        assert 0 <= block["sign_loss_low"] <= block["sign_loss_high"] <= 2 * block["direction_error_l1"]
        assert -1 <= block["descent_share_low"] <= block["descent_share_high"]
        assert block["descent"] <= block["grad_l1"]


def test_key_biases_have_no_gradient_and_their_weights_are_the_drift(results):
    """24 of 96 coordinates of each of two layers: their gradient is rounding, and sign updates moved them all the same."""
    found, raw = results["one"]["signs"]["key_biases"], results["raw"]
    assert found["num_parameters"] == 2 * 32
    heads = torch.arange(96) // 8 % 3 == 1  # [query 8, key 8, value 8] of each of four heads
    names = [name for name in raw["theta"] if name.endswith("linear_qkv.bias")]
    theta = torch.cat([raw["theta"][name][heads] for name in names])
    grad = torch.cat([raw["means"][-1][name][heads] for name in names])
    other = torch.cat([raw["means"][-1][name][~heads] for name in names])
    assert found["mean_abs_theta"] == pytest.approx(float(theta.abs().mean()), rel=1e-5)
    assert found["grad_l1"] == pytest.approx(float(grad.abs().sum()), rel=1e-3)
    assert float(grad.abs().mean()) < 1e-5 * float(other.abs().mean())
    assert found["mean_abs_theta"] > 1e-3, "the biases start at 0 and three steps of 0.02 moved them"


@pytest.mark.parametrize("case", CASES)
def test_every_layout_has_the_same_values(results, case):
    """Rounding flips signs of tiny coordinates; in bf16 the weights themselves differ."""
    relative = 0.05 if "bf16" in case else 2e-3
    for part in ("all", "without_embeddings"):
        found, expected = results[case]["signs"][part], results["one"]["signs"][part]
        for key in ("descent", "descent_share_low", "descent_share_high", "direction_error_l1", "agreement_share"):
            assert found[key] == pytest.approx(expected[key], rel=relative), (part, key)
        assert found["flip_share"] == pytest.approx(expected["flip_share"], abs=0.01)
        assert found["num_parameters"] == expected["num_parameters"]
    assert results[case]["signs"]["kinds"].keys() == results["one"]["signs"]["kinds"].keys()
    assert results[case]["signs"]["key_biases"]["num_parameters"] == 64


def simulated(n, population, generator, d=400):
    """(⟨∇f, sign(c)⟩, statistics) of a quadratic's data set, or of unlimited data; m is a stale gradient."""
    clean = torch.randn(d, generator=generator) / math.sqrt(d)
    m = clean + 0.3 * torch.randn(d, generator=generator) / math.sqrt(d)
    size = population or n
    data = clean + 2 * torch.randn(size, d, generator=generator) / math.sqrt(d)
    truth = clean if population is None else data.mean(0)
    settings = SimpleNamespace(kv_channels=4, num_attention_heads=1, num_query_groups=1)
    signs = SignStatistics(["a.weight"], (0.9, 0.95), 0.0, settings, torch.device("cpu"))
    rungs = [1 << level for level in range(n.bit_length() - 1)] + [n]
    for k in dict.fromkeys(rungs):
        shard = FakeShard("a.weight", torch.zeros(d), data[:k].sum(0), {"exp_avg": m})
        signs.read([shard], batches=k, count=k, scale=1 / k, grad_l2=1.0)
    table = signs.finish([shard], 1 / n)
    c = 0.9 * m + 0.1 * data[0]
    return float(truth @ c.sign()), table.of(lambda row: True, None, 1.0, population)


@pytest.mark.parametrize(("n", "population"), [(32, None), (100, None), (40, 50)])
def test_the_descent_has_no_bias_and_its_interval_holds(n, population):
    generator = torch.Generator().manual_seed(n)
    errors, held = [], 0
    for _ in range(400):
        truth, found = simulated(n, population, generator)
        blocks = len({1 << level for level in range(n.bit_length())} | {n}) - 1
        half = t_quantile(blocks - 1) * found["descent_standard_error"]
        errors.append(found["descent"] - truth)
        held += abs(errors[-1]) <= half
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 20
    assert 0.915 <= held / 400 <= 0.98


def test_a_direction_of_zero_is_counted_and_loses_its_part():
    settings = SimpleNamespace(kv_channels=4, num_attention_heads=1, num_query_groups=1)
    signs = SignStatistics(["a.weight"], (0.9, 0.95), 0.0, settings, torch.device("cpu"))
    grad, m = torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.tensor([-1.0, 0.0, -1.0, 0.0])
    for k in (1, 2):
        shard = FakeShard("a.weight", torch.zeros(4), grad * k, {"exp_avg": m})
        signs.read([shard], batches=k, count=k, scale=1 / k, grad_l2=1.0)
    found = signs.finish([shard], 0.5).of(lambda row: True, None, 1.0, None)
    assert found["descent"] == -1 + 0 + 1 + 2  # signs of c: −, 0, −, +
    assert (found["zero_share"], found["agreement_share"]) == (0.25, 0.5)


def test_query_groups_have_one_key_between_their_queries_and_their_value():
    """Grouped-query attention: 4 heads in 2 groups, head size 2: [q q k v] of each group; a slice starts anywhere."""
    settings = SimpleNamespace(kv_channels=2, num_attention_heads=4, num_query_groups=2)
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    whole = torch.arange(1.0, 17.0)
    keys = torch.tensor([5.0, 6.0, 13.0, 14.0])
    total = 0.0
    for start, end in ((0, 5), (5, 16)):
        signs = SignStatistics([name], (0.9, 0.95), 0.0, settings, torch.device("cpu"))
        piece = whole[start:end]
        shard = FakeShard(name, piece, piece, {"exp_avg": torch.zeros(end - start)}, start)
        signs.read([shard], batches=1, count=1, scale=1.0, grad_l2=1.0)
        table: SignTable = signs.finish([shard], 1.0)
        found = table.of(lambda row: row.endswith(KEY_BIAS), None, 0.0, None)
        total += found["grad_l1"] if found else 0.0
    assert total == float(keys.sum())


def test_a_direction_that_points_uphill_has_a_negative_share_whose_ends_are_in_order():
    settings = SimpleNamespace(kv_channels=4, num_attention_heads=1, num_query_groups=1)
    signs = SignStatistics(["a.weight"], (0.9, 0.95), 0.0, settings, torch.device("cpu"))
    grad, m = torch.ones(4), torch.tensor([-1.0, -1.0, -1.0, 1.0])
    for k in (1, 2):
        shard = FakeShard("a.weight", torch.zeros(4), grad * k, {"exp_avg": m})
        signs.read([shard], batches=k, count=k, scale=1 / k, grad_l2=2.0)
    table = signs.finish([shard], 0.5)
    bounds = {"norm_ratio_low": 1.25, "norm_ratio_high": 2.0, "noise_share": 0.0}  # ‖∇f‖₁ between 2.5 and 4
    found = table.of(lambda row: True, bounds, 2.0, None)
    assert found["descent"] == -2
    assert (found["descent_share_low"], found["descent_share_high"]) == (-0.8, -0.5)
    assert (found["sign_loss_low"], found["sign_loss_high"]) == (4.5, 6.0)
    far_too_low = table.of(lambda row: True, {**bounds, "norm_ratio_low": 0.5}, 2.0, None)
    assert far_too_low["descent_share_low"] == -1.0


def test_frozen_key_biases_have_a_direction_of_zero_as_in_training():
    settings = SimpleNamespace(kv_channels=2, num_attention_heads=2, num_query_groups=2)
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    signs = SignStatistics([name], (0.9, 0.95), 0.0, settings, torch.device("cpu"), freeze_key_bias=True)
    grad = torch.arange(1.0, 13.0)  # [q q k k v v] of two heads
    for k, total in ((1, grad), (2, 0.5 * grad)):  # the second batch is −g/2, which would change signs
        shard = FakeShard(name, torch.zeros(12), total, {"exp_avg": torch.zeros(12)})
        signs.read([shard], batches=k, count=k, scale=1 / k, grad_l2=1.0)
    found = signs.finish([shard], 0.5)
    keys = found.of(lambda row: row.endswith(KEY_BIAS), None, 0.0, None)
    assert (keys["zero_share"], keys["flip_share"], keys["descent"]) == (1.0, 0.0, 0.0)
    assert found.of(lambda row: row == name, None, 0.0, None)["zero_share"] == pytest.approx(4 / 12)
