"""The steps at which a schedule changes: wsd's last step at the peak, its first step below, and the rate at the end."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import tiny
from distributed import run_distributed

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


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_has_the_peak_rate(kind: str, warmup: int) -> None:
    assert lr_at(run_of(kind, 1, warmup, lr=0.5, min_lr=0.0), 1) == 0.5


@pytest.mark.parametrize("kind", ["cosine", "linear", "inverse_sqrt"])
def test_a_run_that_is_all_warmup_ends_at_the_peak(kind: str) -> None:
    assert [lr_at(run_of(kind, 4, 4, lr=1.0, min_lr=0.25), step) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


def test_wsd_without_decay_holds_the_peak_to_the_end() -> None:
    assert [lr_at(run_of("wsd", 10, 2, lr=1.0, min_lr=0.0, decay=0.0), step) for step in (2, 9, 10)] == [1.0, 1.0, 1.0]
    # A share above 0 that rounds to no step decays in the last one.
    assert [lr_at(run_of("wsd", 10, 2, lr=1.0, min_lr=0.5, decay=0.01), step) for step in (2, 9, 10)] == [1.0, 1.0, 0.5]


def test_inverse_sqrt_stops_at_min_lr() -> None:
    run = run_of("inverse_sqrt", 400, 4, lr=1.0, min_lr=0.125)
    assert [lr_at(run, step) for step in (4, 16, 64, 256, 257, 400)] == [1.0, 0.5, 0.25, 0.125, 0.125, 0.125]


def test_the_last_step_at_rate_0_moves_no_weight(tmp_path: Path) -> None:
    """Documented: with min_lr 0 the last step changes the optimizer's state alone."""
    config = tiny.tiny_config(tmp_path / "run", tiny.write_corpus(tmp_path / "corpus"), train__steps=2)
    assert run_distributed(last_step, 1, config) == [(False, [True])]


def last_step(rank: int, config: RunConfig) -> tuple[bool, list[bool]]:
    """Whether the run's last step moved a weight; whether it changed momenta."""
    with tiny.opened_run(config) as run:
        batches = run.train_batches()
        tiny.step_once(run, batches)
        weights = [parameter.detach().clone() for parameter in run.model[0].parameters()]
        momenta = [state["exp_avg"].clone() for state in run.optimizer.inner.state.values()]
        assert not tiny.step_once(run, batches).skipped
        after = [state["exp_avg"] for state in run.optimizer.inner.state.values()]
        moved = any(not one.equal(other) for one, other in zip(weights, run.model[0].parameters(), strict=True))
        return moved, [any(not one.equal(other) for one, other in zip(momenta, after, strict=True))]
