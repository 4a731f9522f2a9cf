"""The parts of a probe one by one: its samples, the coordinate sample, noise, token counts, memory, results."""

from __future__ import annotations

import gc
import json
import logging
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tiny import error_of, opened_run, tiny_config, write_corpus

from megatron_lion.errors import DataError
from megatron_lion.gradient.coordinate_sample import CoordinateSample, Group
from megatron_lion.gradient.noise import estimate_noise, make_rung, mccandlish, rungs_of
from megatron_lion.gradient.norms import GAUSSIAN_RATIO, GradientNorms
from megatron_lion.runs.probes import longest_ladder, read_probe, read_probes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=200)


def probe_config(folder, corpus, **changes):
    return tiny_config(folder, corpus, **{"probe__every": 1, "probe__num_batches": 3, **changes})


# ---------------------------------------------------------------------------------------------- samples


def sample_ids_of(rank, configs):
    """Work of one process: token sums of the samples that probes at steps 0, 1 and again 0 read, and refusals."""
    found = {}
    for name, config in configs.items():
        name_of_error, message = error_of(open_and_close, config)
        if name_of_error:
            found[name] = (name_of_error, message)
            continue
        with opened_run(config) as run:
            reads = []
            for step in (0, 1, 0):
                run.step = step
                reads.append([tuple(row.tolist()) for batch in run.probe_batches() for row in batch["tokens"]])
            found[name] = reads
    return found


def open_and_close(config):
    with opened_run(config):
        pass


@pytest.fixture(scope="module")
def samples(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("samples")
    second = write_corpus(folder / "second", seed=1, documents=100)
    cases = {
        "fixed": {},
        "fresh": {"probe__data": "fresh"},
        "test": {"probe__data": "test", "probe__num_batches": 2},
        "too many": {"probe__num_batches": 1000},
        "too many of the test split": {"probe__data": "test", "probe__num_batches": 1000},
        "fresh blend": {"probe__data": "fresh", "data__path": [corpus, second], "data__weights": [0.5, 0.5]},
        "too many of a blend": {"probe__num_batches": 60, "data__path": [corpus, second], "data__weights": [0.5, 0.5]},
    }
    return run_distributed(sample_ids_of, 1, {n: probe_config(folder / n, corpus, **c) for n, c in cases.items()})[0]


def test_fixed_samples_are_the_same_every_time(samples):
    first, second, again = samples["fixed"]
    assert first == second == again
    assert len(set(first)) == 24, "no sample comes twice"


@pytest.mark.parametrize("case", ["fresh", "fresh blend"])
def test_fresh_samples_differ_from_step_to_step_and_repeat_for_a_step(samples, case):
    first, second, again = samples[case]
    assert first == again != second
    assert len(set(first)) == len(set(second)) == 24


def test_test_split_is_not_the_training_data(samples):
    assert len(samples["test"][0]) == 16
    assert not set(samples["test"][0]) & set(samples["fixed"][0])


@pytest.mark.parametrize("case", ["too many", "too many of the test split", "too many of a blend"])
def test_probe_larger_than_the_data_says_how_many_batches_there_are(samples, case):
    kind, message = samples[case]
    assert kind == "ConfigError"
    assert "probe.num_batches" in message
    most = int(message.split("at most ")[1].split(" ")[0].replace(",", ""))
    tokens = {"too many": 0.8 * 7000, "too many of the test split": 0.1 * 7000, "too many of a blend": 0.8 * 2 * 3500}[
        case
    ]
    assert 0.8 * tokens / 16 / 8 - 1 <= most <= 1.2 * tokens / 16 / 8, message


def test_one_batch_less_than_refused_is_accepted(tmp_path, corpus, samples):
    most = int(samples["too many"][1].split("at most ")[1].split(" ")[0])
    configs = {str(n): probe_config(tmp_path / str(n), corpus, probe__num_batches=n) for n in (most, most + 1)}
    found = run_distributed(sample_ids_of, 1, configs)[0]
    assert len(set(found[str(most)][0])) == len(found[str(most)][0]) == 8 * most
    assert found[str(most + 1)][0] == "ConfigError"


# ---------------------------------------------------------------------------------------------- coordinate sample


def sampled(rank, config, size):
    """Work of one process: estimates of a small sample beside exact norms of the same single batches."""
    from megatron_lion.gradient.accumulate import FullGradient

    with opened_run(config) as run:
        sample = CoordinateSample(run.model, size)
        batches = run.probe_batches()
        settings = {"micro_batch_size": 1, "seq_length": 16, "vocab_size": 120}
        with FullGradient(
            run.model, run.optimizer, run.forward_step, run.ranks,
            num_microbatches=config.num_microbatches(run.ranks.world_size), sample=sample, **settings,
        ) as full:  # fmt: skip
            reads = []
            for _ in range(4):
                full.add(batches)
                reads.append(full.read().norms())
            groups, whole = sample.groups()
        return [vars(group) for group in groups], vars(whole), [norms.as_dict() for norms in reads], sample.fraction


@pytest.mark.parametrize(
    ("size", "changes"),
    [(1, {}), (4, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True})],
    ids=["DP1", "TP2xDP2 SP"],
)
def test_small_sample_estimates_the_whole(tmp_path, corpus, size, changes):
    config = probe_config(tmp_path / "run", corpus, probe__num_batches=4, **changes)
    groups, whole, exact, fraction = run_distributed(sampled, size, config, 8000)[0]
    assert 0.2 < fraction < 0.75
    assert [group["level"] for group in groups] == [0, 0, 1, 0, 0, 1, 2]
    assert whole["l1"] == pytest.approx(exact[-1]["grad_l1"], rel=0.05)
    assert whole["squares"] == pytest.approx(exact[-1]["grad_l2"] ** 2, rel=0.15)
    # the first batch and the first two are prefixes as well: there the exact norms are known
    for group, norms in ((groups[0], exact[0]), (groups[2], exact[1]), (groups[6], exact[3])):
        assert group["l1"] == pytest.approx(norms["grad_l1"], rel=0.05)
        assert group["squares"] == pytest.approx(norms["grad_l2"] ** 2, rel=0.15)
    # ‖a + b‖² = ‖a‖² + ‖b‖² + 2⟨a, b⟩ ties the levels together exactly
    for a, b, both in ((0, 1, 2), (3, 4, 5), (2, 5, 6)):
        left = groups[a]["squares"] + groups[b]["squares"] + 2 * groups[both]["dot"]
        assert left == pytest.approx(4 * groups[both]["squares"], rel=1e-5)


# ---------------------------------------------------------------------------------------------- noise


def simulated_groups(n, d, signal_std, noise_std, generator):
    signal = torch.randn(d, generator=generator, dtype=torch.float64) * signal_std
    batches = signal + torch.randn(n, d, generator=generator, dtype=torch.float64) * noise_std
    groups, level = [], 0
    while 1 << level <= n:
        size = 1 << level
        means = [batches[start : start + size].mean(0) for start in range(0, n - size + 1, size)]
        halves = [
            (batches[s : s + size // 2].mean(0), batches[s + size // 2 : s + size].mean(0))
            for s in range(0, n - size + 1, size)
        ]
        for mean, (a, b) in zip(means, halves, strict=True):
            dot = float(a @ b) if level else None
            groups.append(Group(level, float(mean.abs().sum()), float(mean.square().sum()), size, dot))
        level += 1
    mean = batches.mean(0)
    whole = Group(-1, float(mean.abs().sum()), float(mean.square().sum()), n, None)
    norms = GradientNorms(whole.l1, math.sqrt(whole.squares), float(mean.abs().max()), 0.0, None, 0.0, None, d)
    return signal, groups, whole, norms


@examples(15)
@given(n=st.integers(8, 40), noise=st.floats(0.5, 10.0), seed=st.integers(0, 10**6))
def test_noise_estimates_are_unbiased(n, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(30):
        signal, groups, whole, norms = simulated_groups(n, 400, 1.0, noise, generator)
        estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
        assert estimate.noise_variance == pytest.approx(400 * noise**2, rel=6 * math.sqrt(2 / (400 * (n - 1))))
        errors.append(estimate.signal_l2_squared - float(signal.square().sum()))
    mean, error = sum(errors) / 30, float(torch.tensor(errors).std()) / math.sqrt(30)
    assert abs(mean) < 5 * error


def test_pure_noise_is_called_noise_and_shows_the_gaussian_ratio():
    generator = torch.Generator().manual_seed(1)
    _, groups, whole, norms = simulated_groups(64, 20000, 0.0, 1.0, generator)
    estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
    assert estimate.noise_share == pytest.approx(1.0, abs=0.05)
    assert estimate.is_resolved is False
    assert norms.norm_ratio_over_sqrt_d == pytest.approx(GAUSSIAN_RATIO, abs=0.01)
    rung = make_rung(1, norms, groups)
    assert rung.num_groups == 64


def test_standard_error_of_the_signal_covers_the_spread():
    generator = torch.Generator().manual_seed(2)
    errors, stated = [], []
    for _ in range(200):
        signal, groups, whole, norms = simulated_groups(32, 300, 1.0, 3.0, generator)
        estimate = estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0)
        errors.append(estimate.signal_l2_squared - float(signal.square().sum()))
        stated.append(estimate.signal_standard_error)
    spread, mean_stated = float(torch.tensor(errors).std()), sum(stated) / 200
    assert 0.7 * spread < mean_stated < 2.5 * spread


def test_one_batch_tells_nothing_of_noise():
    _, groups, whole, norms = simulated_groups(1, 50, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert estimate_noise(groups, whole, norms, batch_samples=8, sampled_fraction=1.0) is None
    assert make_rung(1, norms, groups).norm_ratio_std is None


@given(n=st.integers(1, 5000))
@examples(50)
def test_rungs_double_and_end_with_all(n):
    rungs = rungs_of(n)
    assert rungs[0] == 1
    assert rungs[-1] == n
    assert rungs == sorted(set(rungs))
    assert all(b == 2 * a for a, b in pairwise(rungs[:-1]))


@given(signal=st.floats(0.1, 10), variance=st.floats(0, 100), small=st.integers(1, 5), factor=st.integers(2, 50))
@examples(50)
def test_mccandlish_inverts_its_model(signal, variance, small, factor):
    big = small * factor
    found = mccandlish(signal + variance / small, small, signal + variance / big, big)
    assert found == pytest.approx((signal, variance), rel=1e-6, abs=1e-6)


# ---------------------------------------------------------------------------------------------- counts and memory


def huge_counts_and_memory(rank, config):
    """Work of one process: a loss function that counts 2^30 a micro-batch; bytes alive after 3 and after 40 batches."""
    from megatron_lion.gradient.accumulate import FullGradient

    def forward_step(batches, model):
        output, loss_function = run.forward_step(batches, model)

        def counted(value):
            loss, _, sums = loss_function(value)
            many = torch.tensor(2**30, dtype=torch.int)
            return loss, many, {**sums, "num_tokens": many.double()}

        return output, counted

    with opened_run(config) as run:
        batches = run.probe_batches()
        sample = CoordinateSample(run.model, 500)
        before = live_bytes()
        alive = {}
        with FullGradient(
            run.model, run.optimizer, forward_step, run.ranks, num_microbatches=8, micro_batch_size=1, seq_length=16,
            vocab_size=120, sample=sample,
        ) as full:  # fmt: skip
            for number in range(1, 41):
                full.add(batches)
                if number in (3, 10, 20):
                    full.read()
                if number in (3, 40):
                    alive[number] = live_bytes() - before
            scale = full.read().scale
        return full.count, scale, alive, run.model[0].buffers[0].numel


def live_bytes():
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and type(item) is not torch.nn.Parameter:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_counts_beyond_int32_and_flat_memory(tmp_path, corpus):
    config = probe_config(tmp_path / "run", corpus, probe__num_batches=40)
    count, scale, alive, numel = run_distributed(huge_counts_and_memory, 1, config)[0]
    assert count == 40 * 8 * 2**30
    assert scale == pytest.approx(1 / count)
    per_parameter = 4 * numel
    assert alive[40] < 0.75 * per_parameter, "a copy of the gradient would be more"
    # one vector of about 7,000 sampled values for every doubling, and a few scalars a batch
    assert alive[40] - alive[3] < 5 * 4 * 7500 + 40 * 200


# ---------------------------------------------------------------------------------------------- results


def results_of(rank, configs):
    from megatron_lion.gradient.full_gradient import probe_run

    found = {}
    for name, config in configs.items():
        stream = logging.Handler()
        records = []
        stream.emit = lambda record, records=records: records.append(record.getMessage())
        logging.getLogger("megatron_lion.gradient").addHandler(stream)
        with opened_run(config) as run:
            if name == "not finite":
                run.model[0].module.decoder.layers[0].mlp.linear_fc1.bias.data[3] = math.inf
            result = probe_run(run)
            found[name] = (result.metrics(), result.as_dict(), records)
        logging.getLogger("megatron_lion.gradient").removeHandler(stream)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("results")
    cases = {
        "usual": {},
        "no decay": {"optimizer__weight_decay": 0.0},
        "decay all": {"optimizer__weight_decay": 0.5, "optimizer__decay_all": True},
        "no ladder": {"probe__ladder": False},
        "one batch": {"probe__num_batches": 1},
        "not finite": {},
        "bf16": {"train__precision": "bf16"},
    }
    return run_distributed(results_of, 1, {n: probe_config(folder / n, corpus, **c) for n, c in cases.items()})[0]


def test_metrics_keys_and_values(results):
    metrics, content, warnings = results["usual"]
    assert not warnings
    for key in ("loss", "grad_l1", "grad_l2", "grad_linf", "norm_ratio", "norm_ratio_over_sqrt_d", "kkt_residual"):
        assert isinstance(metrics[f"probe/{key}"], float)
    assert metrics["probe/num_batches"] == 3
    assert metrics["probe/num_parameters"] == metrics["probe/num_parameters_unpadded"] + 8 * 32
    assert metrics["probe/sqrt_d"] == pytest.approx(math.sqrt(metrics["probe/num_parameters"]))
    assert metrics["probe/norm_ratio_gaussian"] == pytest.approx(math.sqrt(2 / math.pi) * metrics["probe/sqrt_d"])
    assert metrics["probe/norm_ratio_one_batch"] == content["ladder"][0]["norm_ratio"]
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_without_decay_the_residual_is_undefined_and_said_so(results):
    metrics, content, warnings = results["no decay"]
    assert metrics["probe/kkt_residual"] is None
    assert content["all"]["box_fraction"] is None
    assert content["kkt"].startswith("undefined")
    assert any("no parameter has a weight decay" in text for text in warnings)


def test_decay_all_gives_every_parameter_a_box(results):
    content = results["decay all"][1]
    norms = content["all"]
    assert norms["kkt_residual"] == pytest.approx(0.5 * norms["grad_dot_theta"] + norms["grad_l1"], rel=1e-9)
    assert content["kinds"]["norm"]["kkt_residual"] is not None


def test_a_gradient_that_is_not_finite_is_named_and_written_as_null(results):
    metrics, content, warnings = results["not finite"]
    assert not math.isfinite(metrics["probe/grad_l2"])
    assert content["all"]["grad_l2"] is None
    assert any("not finite, first in" in text for text in warnings)


def test_without_ladder_and_with_one_batch_there_is_no_noise(results):
    assert results["no ladder"][1]["ladder"] == []
    for case in ("no ladder", "one batch"):
        assert results[case][1]["noise"] is None
        assert results[case][0]["probe/noise_share"] is None
    assert results["no ladder"][1]["all"] == pytest.approx(results["usual"][1]["all"], rel=1e-6)


def test_bf16_takes_theta_from_master_weights_and_comes_near_fp32(results):
    half, full = results["bf16"][1], results["usual"][1]
    assert half["theta"] == "master weights"
    assert half["all"]["theta_linf"] == full["all"]["theta_linf"]
    assert half["all"]["norm_ratio"] == pytest.approx(full["all"]["norm_ratio"], rel=0.05)


def test_damaged_results_are_refused(tmp_path):
    folder = tmp_path / "probe"
    folder.mkdir()
    with pytest.raises(DataError, match="no probe results"):
        read_probes(tmp_path)
    (folder / "step_0000001.json").write_text('{"format": 1, "st')
    with pytest.raises(DataError, match="damaged"):
        read_probes(tmp_path)
    (folder / "step_0000001.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 1"):
        read_probe(folder / "step_0000001.json")


def test_the_ladder_shown_is_the_longest_of_the_same_data(tmp_path):
    folder = tmp_path / "probe"
    folder.mkdir()

    def write(name: str, batches: int, data: str = "fixed", ladder: bool = True) -> dict[str, Any]:
        content = {"format": 1, "step": 7, "mode": "frozen", "data": data, "dropout": False, "global_batch_size": 8}
        content |= {"num_batches": batches, "ladder": [{"num_batches": 1}] if ladder else []}
        (folder / name).write_text(json.dumps(content))
        return content

    own = write("step_0000007.json", 4)
    assert longest_ladder(tmp_path, own) == own
    longer = write("step_0000007-16-fixed.json", 16)
    write("step_0000007-32-test.json", 32, data="test")
    write("step_0000007-64-fixed.json", 64, ladder=False)
    assert longest_ladder(tmp_path, own) == longer
