"""Counts and memory of a probe, and the results it writes and reads."""

from __future__ import annotations

import gc
import json
import logging
import math
from typing import Any

import pytest
import torch
from distributed import run_distributed
from probe_cases import probe_config
from tiny import opened_run, tiny_config

from megatron_lion.errors import DataError
from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.moving import window_cost
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.parallel import Ranks
from megatron_lion.runs.probes import longest_ladder, read_probe, read_probes


def huge_counts_and_memory(rank, config):
    """Work of one process: counts 2^30 per micro-batch; measures live bytes after 20 and after 40 batches."""
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
        groups = GroupedBatches(GradientSketch(run.model, 128, 128), 40)
        before = live_bytes()
        alive = {}
        with FullGradient(
            run.model, run.optimizer, forward_step, run.ranks, num_microbatches=8, micro_batch_size=1, seq_length=16,
            vocab_size=120, groups=groups,
        ) as full:  # fmt: skip
            for number in range(1, 41):
                full.add(batches)
                if number in (3, 10, 20):
                    full.read()
                if number in (20, 40):
                    alive[number] = live_bytes() - before
            scale = full.read().scale
        return full.count, scale, alive, run.model[0].buffers[0].numel, 4 * groups.sketch.size


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
    count, scale, alive, numel, vector = run_distributed(huge_counts_and_memory, 1, config)[0]
    assert count == 40 * 8 * 2**30
    assert scale == pytest.approx(1 / count)
    # Batches are kept in pairs. Besides them: one unpaired batch, the buffers' sketch before the next batch, weights and
    # places of the sketch, and a few scalars a batch.
    for batches in (20, 40):
        beyond = alive[batches] - vector * (batches // 2)
        assert beyond < 0.75 * 4 * numel, "a copy of the gradient would be more"
    assert alive[40] - alive[20] < 10.5 * vector + 40 * 300


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
        "not finite": {"probe__num_batches": 4},
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


@pytest.mark.parametrize(("sharded", "mebibytes"), [(True, "1.5"), (False, "3.0")])
def test_cost_of_a_moving_window_is_four_bytes_per_parameter_of_the_shard(tmp_path, sharded, mebibytes):
    """3 Mi parameters: 12 MiB over TP 2 × PP 2, and over 2 data-parallel ranks too if the optimizer is sharded."""
    config = tiny_config(tmp_path, "data", parallel__use_distributed_optimizer=sharded, probe__num_batches=7)
    ranks = Ranks(rank=0, world_size=8, dp_rank=0, dp_size=2, tp_rank=0, tp_size=2, pp_rank=0, pp_size=2)
    assert f"use {mebibytes} MiB more per process" in window_cost(config, 3 * 2**20, ranks)


def probe_of(rungs, step=0):
    """Content of a probe file, as far as the figures read it."""
    ladder = [
        {"num_batches": k, "norm_ratio": 90.0, "norm_ratio_standard_error": error, "num_groups": groups}
        for k, error, groups in rungs
    ]
    part = {
        "norm_ratio": 90.0,
        "norm_ratio_over_sqrt_d": 0.9,
        "num_parameters": 10_000,
        "grad_l1": 90.0,
        "grad_l2": 1.0,
    }
    return {
        "step": step, "optimizer": "lion", "num_batches": rungs[-1][0], "ladder": ladder, "all": part,
        "without_embeddings": part, "layers": {"layer 0": part}, "parameters": {"layers.0.bias": part},
        "noise": {"norm_ratio_low": 80.0, "norm_ratio_high": 95.0},
    }  # fmt: skip


def drawn_bars(monkeypatch, tmp_path, plot, probes):
    """Half lengths of the error bars of a figure, and the texts on the axis on top."""
    from matplotlib.container import ErrorbarContainer

    from megatron_lion.gradient import probe_figures

    kept = []
    monkeypatch.setattr(probe_figures, "save_figure", lambda figure, path: kept.append(figure))
    plot({"LION": probes}, tmp_path / "figure.png")
    axes = kept[0].axes[0]
    bars = [item for item in axes.containers if isinstance(item, ErrorbarContainer)]
    halves = [
        (segment[1][1] - segment[0][1]) / 2
        for bar in bars
        for lines in bar.lines[2]
        for segment in lines.get_segments()
    ]
    top = [label.get_text() for child in axes.child_axes for label in child.get_xticklabels()]
    open_circles = sum(line.get_marker() == "o" and line.get_markerfacecolor() == "none" for line in axes.lines)
    return halves, top, open_circles


def test_the_ladder_has_95_percent_bars_with_their_groups_and_none_that_is_zero(monkeypatch, tmp_path):
    """Student's quantiles: 2.1314 for 16 groups, 3.1824 for 4. The value without an error is an open circle."""
    from megatron_lion.gradient.probe_figures import plot_ladder

    probe = probe_of([(1, 2.0, 16), (2, None, 2), (4, 1.0, 4)])
    halves, top, open_circles = drawn_bars(monkeypatch, tmp_path, plot_ladder, [probe])
    assert sorted(set(halves)) == pytest.approx([3.1824, 4.2629], abs=1e-3)
    assert top == ["16", "4"]
    assert open_circles == 2  # the run's first and last probe, here the same


def test_the_ratio_over_training_has_the_bar_of_the_reported_value(monkeypatch, tmp_path):
    from megatron_lion.gradient.probe_figures import plot_ratio

    probes = [probe_of([(1, 2.0, 8), (8, 0.5, 8)]), probe_of([(1, 2.0, 2), (2, None, 2)], step=100)]
    halves, _, _ = drawn_bars(monkeypatch, tmp_path, plot_ratio, probes)
    assert halves == pytest.approx([0.5 * 2.3646], abs=1e-3)


def test_results_of_earlier_versions_are_drawn_without_their_spread_of_two_groups(monkeypatch, tmp_path):
    from megatron_lion.gradient.probe_figures import plot_ladder

    probe = probe_of([(1, None, 4)])
    del probe["ladder"][0]["norm_ratio_standard_error"]
    probe["ladder"][0]["norm_ratio_std"] = 0.001
    assert drawn_bars(monkeypatch, tmp_path, plot_ladder, [probe])[0] == []
