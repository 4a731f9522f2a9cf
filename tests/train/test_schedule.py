"""Learning rates: values at the corners, continuity and bounds of every kind."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from megatron_lion.config_checks import check_config
from megatron_lion.errors import ConfigError
from megatron_lion.train.schedule import lr_at

KINDS = ["cosine", "linear", "constant", "inverse_sqrt", "wsd"]


def run_of(
    kind: str, *, steps: int, warmup: int, lr: float = 1.0, min_lr: float = 0.0, decay: float = 0.2
) -> RunConfig:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr=min_lr, wsd_decay_fraction=decay)
    return RunConfig(
        schedule=schedule, optimizer=OptimizerConfig(lr=lr), train=TrainConfig(steps=steps, global_batch_size=8)
    )


@st.composite
def schedules(draw: st.DrawFn) -> RunConfig:
    kind = draw(st.sampled_from(KINDS))
    steps = draw(st.integers(1, 5000))
    decay = draw(st.floats(0, 1))
    room = steps - (round(decay * steps) if kind == "wsd" else 0)
    lr = draw(st.floats(1e-8, 10))
    low = 0.0 if kind == "constant" else lr * draw(st.floats(0, 1))
    return run_of(kind, steps=steps, warmup=draw(st.integers(0, room)), lr=lr, min_lr=low, decay=decay)


@examples(60)
@given(schedules())
def test_bounds_warmup_end_and_continuity(run: RunConfig) -> None:
    check_config(run, 1)
    steps, warmup, peak, low = run.train.steps, run.warmup_steps, run.optimizer.lr, run.schedule.min_lr
    rates = [lr_at(run, step) for step in range(1, steps + 1)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup])), "warm-up rises"
    if warmup >= 1:
        assert rates[warmup - 1] == pytest.approx(peak), "the peak is reached at the last step of warm-up"
        assert rates[0] == pytest.approx(peak / warmup)
    tail = rates[max(0, warmup - 1) :]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(tail)), "and then it never rises"
    if steps == 1:
        assert rates == [peak], "a run of one step does something"
        return
    if run.schedule.kind in ("cosine", "linear") and warmup < steps:
        assert rates[-1] == pytest.approx(low, abs=1e-12 * peak)
    if run.schedule.kind == "wsd" and round(run.schedule.wsd_decay_fraction * steps) >= 1:
        assert rates[-1] == pytest.approx(low, abs=1e-12 * peak)
    if run.schedule.kind in ("cosine", "linear", "wsd"):
        decay = steps - warmup if run.schedule.kind != "wsd" else round(run.schedule.wsd_decay_fraction * steps)
        largest = (peak - low) * math.pi / 2 / max(1, decay) + 1e-12 * peak
        assert all(a - b <= largest for a, b in itertools.pairwise(tail)), "no jump"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", {5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("constant", {5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("inverse_sqrt", {5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ("wsd", {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_values(kind: str, expected: dict[int, float]) -> None:
    run = run_of(kind, steps=100, warmup=10, min_lr=0.1)
    assert {step: pytest.approx(rate) for step, rate in expected.items()} == {s: lr_at(run, s) for s in expected}


def test_warmup_may_be_a_share_of_the_steps() -> None:
    run = RunConfig(schedule=ScheduleConfig(warmup_fraction=0.03), train=TrainConfig(steps=1000))
    assert run.warmup_steps == 30


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "wsd", "warmup": 90, "decay": 0.2}, "schedule.warmup_steps: must be between 0 and 80 .*, got 90"),
        ({"kind": "wsd", "warmup": 0, "decay": 1.5}, "schedule.wsd_decay_fraction: .* got 1.5"),
        ({"kind": "cosine", "warmup": 101}, "schedule.warmup_steps: .* got 101"),
        ({"kind": "cosine", "warmup": 0, "min_lr": -0.1}, "schedule.min_lr: .* got -0.1"),
        ({"kind": "cosine", "warmup": 0, "min_lr": 2.0}, "schedule.min_lr: .* got 2.0"),
        ({"kind": "constant", "warmup": 0, "min_lr": 0.1}, "schedule.min_lr: must be 0 with .* constant, got 0.1"),
        ({"kind": "cosine", "warmup": 0, "min_lr": math.nan}, "schedule.min_lr: .* got nan"),
        ({"kind": "cosine", "warmup": 0, "lr": math.nan}, "optimizer.lr: .* got nan"),
        ({"kind": "cosine", "warmup": 0, "lr": math.inf}, "optimizer.lr: .* got inf"),
    ],
)
def test_schedules_that_cannot_be(change: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        check_config(run_of(steps=100, **change), 1)


def test_a_share_that_is_no_number_is_reported_with_the_rest() -> None:
    run = RunConfig(schedule=ScheduleConfig(warmup_fraction=math.nan), optimizer=OptimizerConfig(lr=-1))
    with pytest.raises(ConfigError) as caught:
        check_config(run, 1)
    assert "schedule.warmup_fraction: must be a number in [0, 1], got nan" in str(caught.value)
    assert "optimizer.lr: must be a finite number of at least 0, got -1" in str(caught.value)
