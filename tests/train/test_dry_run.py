"""`--dry-run` and the summary at the start of a run: memory, time and the number of passes over the data."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from megatron_lion.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megatron_lion.train import dryrun
from megatron_lion.train.dryrun import _cpu_flops, _duration, dry_run, passes_warning, split_warning

NOWHERE = ("/no/such/file",)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_corpus(tmp_path_factory.mktemp("dry-run") / "corpus")


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dryrun, "DRIVER_FILES", NOWHERE)


def paper(device: str = "auto", precision: Any = "bf16", steps: int = 50_000) -> RunConfig:
    """GPT-2 124M on 32.8 B tokens: 2.8e19 FLOP."""
    return RunConfig(
        model=ModelConfig(vocab_size=50257), train=TrainConfig(steps=steps, precision=precision), device=device
    )


def lines_of(config: RunConfig, label: str, world_size: int = 1) -> list[str]:
    return [line[13:] for line in dry_run(config, world_size).splitlines() if line[:13].strip() == label]


# ---- time


def test_a_run_on_a_cpu_is_not_timed_as_one_on_a100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dryrun, "_cpu_flops", lambda world_size: 1e11)
    (line,) = lines_of(paper("cpu", "fp32"), "time")
    # 2.8e19 FLOP / (0.4 x 1e11 FLOP/s) = 7e8 s
    assert re.fullmatch(r"roughly 22\.\d years on this machine's CPU, if nothing else runs there", line)
    (line,) = lines_of(paper("cpu", "bf16"), "time")
    assert line == "not estimated for 16 bits on a CPU; the first steps show it"
    assert "A100" not in dry_run(paper("cpu", "fp16"), 1)


def test_without_a_card_the_a100_is_an_assumption() -> None:
    cpu, card = lines_of(paper(), "time", 16)
    assert cpu.startswith("not estimated for 16 bits on a CPU")
    # 2.8e19 FLOP / (0.4 x 312e12 FLOP/s x 16) = 14,020 s
    assert card == "about 3.9 hours on 16 x A100 (assumed) at 40% of its bf16 peak"
    (only,) = lines_of(paper("cuda", "fp32"), "time")
    assert only == "about 41.6 days on 1 x A100 (assumed) at 40% of its fp32 peak"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "about 19.7 hours on 1 x NVIDIA H100 80GB HBM3 at 40% of its bf16 peak"),
        (
            "Tesla T4",
            "about 2.6 days on 1 x A100 (assumed) at 40% of its bf16 peak; the bf16 peak of Tesla T4 is not known",
        ),
        (None, "about 2.6 days on 1 x A100 (assumed) at 40% of its bf16 peak"),
    ],
)
def test_the_card_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: str | None, expected: str) -> None:
    """None: the driver is there, but torch cannot use it."""
    import torch

    def get_device_name(index: int) -> str:
        if name is None:
            raise RuntimeError("CUDA unknown error")
        return name

    monkeypatch.setattr(dryrun, "DRIVER_FILES", (__file__,))
    monkeypatch.setattr(dryrun, "_kernel_lines", lambda config: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", get_device_name)
    assert lines_of(paper(), "time")[-1] == expected
    assert len(lines_of(paper(), "time")) == (2 if name is None else 1)


def test_no_time_is_zero_seconds() -> None:
    shown = [_duration(seconds, "about") for seconds in (0.0, 1e-9, 0.6, 0.99, 1.0, 1.49, 1.5, 119.0, 120.0, 1e20)]
    assert shown[:4] == ["less than a second"] * 4
    assert shown[4:8] == ["about a second", "about a second", "about 2 seconds", "about 119 seconds"]
    assert shown[8] == "about 2.0 minutes"
    assert not any(" 0 " in text for text in shown)


def test_the_speed_of_the_cpu_is_measured_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that advances 10 µs at each reading; 64 x 64 matrices are 2 x 64³ operations."""
    reading = [0.0]

    def clock() -> float:
        reading[0] += 1e-5
        return reading[0]

    monkeypatch.setattr(dryrun.time, "perf_counter", clock)
    monkeypatch.setattr(dryrun.os, "sched_getaffinity", lambda pid: set(range(8)))
    a_thread = 2 * 64**3 / 1e-5
    for threads, world_size, used in ((None, 1, 8), ("1", 1, 1), ("1", 4, 4), ("4", 4, 8), ("0", 1, 8), ("x", 1, 8)):
        if threads is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert _cpu_flops(world_size) == pytest.approx(used * a_thread, rel=1e-6)


# ---- memory


def test_each_precision_mode_shows_its_memory(tmp_path: Path) -> None:
    def shown(**changes: Any) -> tuple[str, str]:
        config = tiny.tiny_config(tmp_path, "none", **changes)
        config = dataclasses.replace(paper("cpu", config.train.precision), optimizer=config.optimizer)
        (memory,), (state,) = lines_of(config, "memory"), lines_of(config, "state")
        return str(re.search(r"optimizer ([\d.]+ [MG]iB)", memory)[1]), state

    d = 124_475_904
    modes = {
        "fp32": (4 * d, {"train__precision": "fp32"}),
        "auto": (6 * d, {"train__precision": "bf16"}),
        "auto, sgd": (8 * d, {"train__precision": "bf16", "optimizer__name": "sgd"}),
        "bf16": (8 * d, {"train__precision": "bf16", "optimizer__master_weights": "shards"}),
        "split32": (6 * d, {"train__precision": "bf16", "optimizer__master_weights": "split32"}),
        "int8": (
            d * (1 + 34 / 32),
            {"train__precision": "bf16", "optimizer__master_weights": "split24", "optimizer__momentum_dtype": "int8"},
        ),
    }
    for name, (expected, changes) in modes.items():
        assert shown(**changes)[0] == f"{expected / 2**20:.3g} MiB", name
    assert shown(**modes["int8"][1])[1] == (
        "bf16 parameters with split24 master weights, int8 momentum; one data-parallel process has all of it"
    )
    assert shown(**modes["fp32"][1], optimizer__name="adamw")[1].startswith(
        "fp32 parameters without a copy, two fp32 moments"
    )


# ---- passes over the data


def test_many_passes_give_a_warning_with_the_steps_of_twenty(tmp_path: Path, corpus: str) -> None:
    import numpy as np

    tokens = len(np.fromfile(f"{corpus}.bin", dtype=np.uint16)) * 8 // 10  # the 80 % of data.split
    a_step = 8 * 16
    most = 20 * tokens // a_step
    assert lines_of(tiny.tiny_config(tmp_path, corpus, train__steps=most), "warning") == []
    (line,) = lines_of(tiny.tiny_config(tmp_path, corpus, train__steps=10 * most), "warning")
    passes = 10 * most * a_step / tokens
    assert line == (
        f"the training data is read {passes:,.1f} times; 20 passes are {most:,} steps: set train.steps, or add data"
    )
    (tokens_line,) = lines_of(tiny.tiny_config(tmp_path, corpus, train__steps=10 * most), "tokens")
    assert f"= {passes:,.2f} x the {tokens:,} of the training data" in tokens_line


def test_a_batch_larger_than_twenty_passes_has_another_remedy() -> None:
    config = RunConfig(train=TrainConfig(steps=3, global_batch_size=640))
    warning = passes_warning(config, 1000)
    assert warning is not None
    assert math.isclose(float(re.sub(r"\D", "", warning.split(";")[0])), 3 * 640 * 1024 / 1000, rel_tol=1e-3)
    assert warning.endswith("set a smaller train.global_batch_size, or add data")
    assert passes_warning(config, None) is None
    assert passes_warning(config, 0) is None


def test_a_split_of_divided_data_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    for path, split, warned in ((str(tmp_path), "80,10,10", True), (str(tmp_path / "prefix"), "80,10,10", False)):
        config = RunConfig(data=DataConfig(path=[path], split=split))
        assert (split_warning(config) is not None) == warned
    assert split_warning(RunConfig(data=DataConfig(path=[str(tmp_path)]))) is None


def test_the_start_of_a_run_reports_the_passes(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    from megatron_lion.train import console

    def said(steps: int) -> str:
        config = tiny.tiny_config(tmp_path, corpus, train__steps=steps)
        ranks = SimpleNamespace(world_size=1, tp_size=1, pp_size=1, dp_size=1, is_main=True)
        corpora = SimpleNamespace(vocab_size=120, train_tokens=1280)
        run: Any = SimpleNamespace(
            config=config, ranks=ranks, corpora=corpora, device=SimpleNamespace(kind="cpu"), step=0
        )
        console.announce(run, resumed=False)
        return capsys.readouterr().err

    few = said(200)
    assert "200 steps = 25,600 tokens = 20.00 x the 1,280 of the training data" in few
    assert "warning" not in few
    many = said(201)
    assert "warning: the training data is read 20.1 times; 20 passes are 200 steps" in many
