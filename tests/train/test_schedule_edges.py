"""The steps at which a schedule changes: wsd's last step at the peak, its first step below, and the rate at the end."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_lion.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from megatron_lion.train.schedule import lr_at


def run_of(kind: str, steps: int, warmup: int, lr: float, min_lr: float, decay: float = 0.2) -> RunConfig:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr=min_lr, wsd_decay_fraction=decay)
    return RunConfig(schedule=schedule, optimizer=OptimizerConfig(lr=lr), train=TrainConfig(steps=steps))


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "rates"),
    [
        # Calculated by hand at lr = 1 and min_lr = 0.2: the last round(decay · steps) steps decrease by equal amounts,
        # and the last of them is at min_lr.
        (10, 0, 0.2, {1: 1.0, 8: 1.0, 9: 0.6, 10: 0.2}),
        (10, 2, 0.4, {1: 0.5, 2: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2}),
        (10, 6, 0.4, {5: 5 / 6, 6: 1.0, 7: 0.8, 10: 0.2}),  # warm-up ends where the decay begins
        (10, 0, 0.1, {9: 1.0, 10: 0.2}),  # one step
        (10, 0, 0.25, {8: 1.0, 9: 0.6, 10: 0.2}),  # round(2.5) is 2
        (10, 0, 0.35, {6: 1.0, 7: 0.8, 10: 0.2}),  # round(3.5) is 4
        (4, 0, 1.0, {1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2}),  # from the first step on
        (1000, 10, 0.2, {10: 1.0, 799: 1.0, 800: 1.0, 801: 0.996, 802: 0.992, 900: 0.6, 999: 0.204, 1000: 0.2}),
    ],
)
def test_wsd_holds_the_peak_until_its_decay_starts(
    steps: int, warmup: int, decay: float, rates: dict[int, float]
) -> None:
    run = run_of("wsd", steps, warmup, lr=1.0, min_lr=0.2, decay=decay)
    for step, rate in rates.items():
        assert lr_at(run, step) == pytest.approx(rate, rel=1e-12), step
    at_peak = [step for step in range(1, steps + 1) if lr_at(run, step) == 1.0]
    assert at_peak == [step for step in range(max(1, warmup), steps + 1) if step <= steps - round(decay * steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("lr", "min_lr"), [(1e-3, 1e-4), (0.3, 0.03), (3e-4, 3e-5), (1.0, 0.0), (0.1, 0.1)])
def test_the_last_step_is_at_min_lr_exactly(kind: str, lr: float, min_lr: float) -> None:
    for steps, warmup in ((7, 1), (12, 9), (100, 0), (1000, 30)):
        run = run_of(kind, steps, warmup, lr, min_lr)
        assert lr_at(run, steps) == min_lr, (steps, warmup)
        assert min(lr_at(run, step) for step in range(max(1, warmup), steps + 1)) == min_lr, (steps, warmup)


def test_linear_goes_down_by_equal_amounts_from_the_end_of_warmup() -> None:
    lr, min_lr, steps, warmup = 3e-4, 3e-5, 50, 6
    run = run_of("linear", steps, warmup, lr, min_lr)
    assert lr_at(run, warmup - 1) == pytest.approx(lr * 5 / 6, rel=1e-12)
    assert lr_at(run, warmup) == lr
    amount = (Fraction(lr) - Fraction(min_lr)) / (steps - warmup)
    for step in range(warmup, steps + 1):
        assert lr_at(run, step) == pytest.approx(float(Fraction(lr) - amount * (step - warmup)), rel=1e-12), step
