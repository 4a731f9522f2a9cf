"""`probe.num_batches: all`: loss and gradient of every sample of a data set, once each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from distributed import run_distributed
from probe_cases import probe_config
from tiny import error_of, opened_run, write_corpus
from tiny_bert import documents, tiny_bert, write_bert_corpus


def whole_probe(rank, configs):
    """Work of one process: the probes, and how many samples of each corpus there are."""
    from megatron_lion.gradient.full_gradient import probe_run

    found = {}
    for name, config in configs.items():
        with opened_run(config) as run:
            result = probe_run(run)
            found[name] = (result.as_dict(), result.metrics(), run.probe_samples.available)
    return found


def plain_gradient(rank, config, kind):
    """Work of one process: mean loss, norms and number of samples, one sample at a time by plain autograd."""
    with opened_run(config) as run:
        samples, network = run.probe_samples, run.model[0].module.eval()
        parameters = list(network.parameters())
        parts, totals, counts = [], [0.0, 0.0], [0, 0]
        for index in range(samples.available):
            item = {key: torch.as_tensor(value)[None] for key, value in samples.dataset[index].items()}
            losses = bert_losses(network, item) if kind == "bert" else gpt_losses(network, item)
            for place, (loss, count) in enumerate(losses):
                totals[place] += float(loss.detach())
                counts[place] += count
            parts.append(
                [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss, _ in losses]
            )
        mean = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        for part in parts:
            for place, gradients in enumerate(part):
                for total, gradient in zip(mean, gradients, strict=True):
                    if gradient is not None:
                        total += gradient.double() / counts[place]
        flat = torch.cat([total.flatten() for total in mean])
        loss = sum(total / count for total, count in zip(totals, counts, strict=True) if count)
        return {
            "loss": loss,
            "grad_l1": float(flat.abs().sum()),
            "grad_l2": float(flat.norm()),
            "samples": samples.available,
        }


def gpt_losses(network, item):
    losses = network(item["tokens"], item["position_ids"], None, labels=item["labels"])
    return [(losses.sum(), losses.numel())]


def bert_losses(network, item):
    (losses, _), order = network(item["tokens"], item["padding_mask"], item["types"], item["positions"], item["labels"])
    masked = (losses * item["loss_mask"]).sum()
    return [(masked, int(item["loss_mask"].sum())), (F.cross_entropy(order, item["is_random"], reduction="sum"), 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return write_corpus(folder / "corpus", documents=60), write_bert_corpus(folder / "bert", documents(40, 12))


ALL = {"probe__num_batches": "all", "probe__every": 1}


def config_of(kind, data, folder, **changes):
    corpus, text = data
    return (
        tiny_bert(folder, text, **ALL, **changes) if kind == "bert" else probe_config(folder, corpus, **ALL, **changes)
    )


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_it_is_the_gradient_of_the_mean_loss_over_every_sample(tmp_path, data, kind):
    """Batches of 7 leave a rest in the last batch, whose other samples must not count; of 8 on two processes too."""
    expected = run_distributed(plain_gradient, 1, config_of(kind, data, tmp_path / "plain"), kind)[0]
    assert expected["samples"] % 7, "the last batch must be incomplete"
    one = {"7": config_of(kind, data, tmp_path / "7", train__global_batch_size=7)}
    two = {"8": config_of(kind, data, tmp_path / "8")}
    found = run_distributed(whole_probe, 1, one)[0] | run_distributed(whole_probe, 2, two)[0]
    for size, (content, metrics, available) in found.items():
        assert available == content["num_samples"] == content["population_samples"] == expected["samples"]
        assert content["num_batches"] == math.ceil(available / int(size))
        assert content["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        for key in ("grad_l1", "grad_l2"):
            assert content["all"][key] == pytest.approx(expected[key], rel=1e-5)
        assert content["noise"]["noise_share"] == content["loss_standard_error"] == 0.0
        assert metrics["probe/grad_l2_corrected"] == pytest.approx(metrics["probe/grad_l2"])
        assert metrics["probe/norm_ratio_standard_error"] == 0.0
        assert content["noise"]["norm_ratio_low"] == pytest.approx(content["all"]["norm_ratio"], rel=1e-5)


def test_it_is_refused_where_there_is_no_last_sample_and_allowed_for_a_blend_by_size(tmp_path, data):
    second = write_corpus(tmp_path / "second", seed=1, documents=30)
    cases = {
        "weights": {"data__path": [data[0], second], "data__weights": [0.5, 0.5]},
        "moving": {"probe__mode": "moving", "probe__every": 1000},
        "sizes": {"data__path": [data[0], second]},
        "small": {"train__global_batch_size": 4096, "probe__data": "test"},
    }
    configs = {name: probe_config(tmp_path / name, data[0], **{**ALL, **changes}) for name, changes in cases.items()}
    found = run_distributed(errors_of, 1, configs)[0]
    assert "blend with data.weights" in found["weights"][1]
    assert "a number with probe.mode moving" in found["moving"][1]
    assert "fewer than a batch of 4,096" in found["small"][1]
    assert found["weights"][0] == found["moving"][0] == found["small"][0] == "ConfigError"
    assert found["sizes"][0] is None
    assert found["sizes"][1] > 0


def errors_of(rank, configs):
    return {name: opened(config) for name, config in configs.items()}


def opened(config):
    """(None, number of samples), or (name of the error, its message)."""
    from megatron_lion.config_checks import check_config

    counted = []

    def open_it(config):
        check_config(config, 1)
        with opened_run(config) as run:
            counted.append(run.probe_samples.population)

    name, message = error_of(open_it, config)
    return (name, message) if name else (None, counted[0])
