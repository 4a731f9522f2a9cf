"""When a run may save and when it gives up, with a small stand-in for the run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_lion.errors import DataError, NumericsError
from megatron_lion.train import health
from megatron_lion.train.health import Health
from megatron_lion.train.step import TrainStep

GOOD = TrainStep(loss=1.0, grad_l2=1.0, num_tokens=8, skipped=False)
BAD = TrainStep(loss=math.nan, grad_l2=math.nan, num_tokens=8, skipped=True)
UNCOUNTED = TrainStep(loss=math.nan, grad_l2=0.0, num_tokens=0, skipped=True, uncounted="num_tokens")
NAN, INF = math.nan, math.inf


class Case:
    """A run of 100 steps that gives up after three skipped ones.

    Attributes:
        damage: tensors of the state that are not finite.
        trial: loss and gradient norm of the last micro-batch after the step.
        tried: how often that gradient was taken.
        lines: what was written to the metrics.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, precision: str = "fp32", steps: int = 100
    ) -> None:
        self.damage: list[str] = []
        self.trial, self.tried = (1.0, 1.0), 0
        self.lines: list[dict[str, Any]] = []
        config = SimpleNamespace(
            train=SimpleNamespace(steps=steps, precision=precision), optimizer=SimpleNamespace(max_skipped_steps=3)
        )
        self.run: Any = SimpleNamespace(
            step=0, config=config, model=None, run_dir=folder, ranks=SimpleNamespace(is_main=True, world_size=1),
            optimizer=SimpleNamespace(num_steps=0, num_skipped=0),
        )  # fmt: skip
        monkeypatch.setattr(health, "local_damage", lambda model, optimizer: self.damage)
        monkeypatch.setattr(health, "gather_damage", lambda found: found)
        monkeypatch.setattr(health, "describe_damage", lambda found: f"the {found[0]}")
        monkeypatch.setattr(health, "nonfinite_gradients", lambda model: ["a weight"])
        monkeypatch.setattr(dist, "all_gather_object", lambda found, item: found.__setitem__(0, item))
        monkeypatch.setattr(health, "trial_gradient", self._try)
        metrics: Any = SimpleNamespace(write=lambda step, values: self.lines.append(values))
        self.health = Health(self.run, metrics)

    def _try(self, run: Any, batch: Any) -> tuple[float, float]:
        self.tried += 1
        return self.trial

    def take(self, *results: TrainStep) -> None:
        for result in results:
            self.run.step += 1
            self.run.optimizer.num_skipped += result.skipped
            self.run.optimizer.num_steps += not result.skipped
            self.health.judge(result)

    def may_save(self) -> bool:
        return self.health.may_save({})


@pytest.mark.parametrize(
    ("precision", "trial", "saved"),
    [
        ("fp32", (1.0, 1.0), True),
        ("fp32", (NAN, 1.0), False),
        ("fp32", (INF, 1.0), False),
        ("fp32", (1.0, NAN), False),
        ("bf16", (1.0, INF), False),
        ("bf16", (1.0, 1.9e19), False),  # its square is not finite in fp32, so the next step would be skipped
        ("bf16", (1.0, 1.8e19), True),
        ("fp16", (1.0, INF), True),  # the scaled loss overflows by design
        ("fp16", (NAN, 1.0), False),
    ],
)
def test_a_state_is_saved_if_the_gradient_of_its_own_samples_is_finite(
    precision: str, trial: tuple[float, float], saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(monkeypatch, tmp_path, precision)
    case.take(GOOD)
    case.trial = trial
    assert case.may_save() == saved


def test_nothing_is_saved_after_a_skipped_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, tmp_path)
    case.take(GOOD, BAD)
    assert not case.may_save()
    assert case.tried == 0
    case.take(GOOD)
    assert case.may_save()
    case.damage = ["momentum"]
    with pytest.raises(NumericsError, match=r"step 3: the training state is damaged: the momentum\. It was not saved"):
        case.may_save()
    assert case.tried == 1
    assert case.lines[-1] == {"optim/nonfinite_state": "the momentum", "optim/gave_up": 1}


def test_the_last_save_of_a_run_is_not_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 the last step may be skipped: the state before it is saved, if it is sound."""
    case = Case(monkeypatch, tmp_path, "fp16", steps=2)
    case.take(GOOD, BAD)
    assert case.may_save()
    case.trial = (NAN, 1.0)
    with pytest.raises(NumericsError, match="step 2: after it, the gradient of its own samples is NaN"):
        case.may_save()


def test_a_dead_state_ends_the_run_after_three_tries_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, tmp_path)
    for trial in [(NAN, 1.0), (NAN, 1.0), (1.0, 1.0), (NAN, 1.0), (NAN, 1.0)]:
        case.take(GOOD)
        case.trial = trial
        assert case.may_save() == (trial == (1.0, 1.0))
    case.take(GOOD)
    with pytest.raises(
        NumericsError, match=r"step 6: after it.*not saved\. Start again with a lower optimizer\.lr"
    ) as found:
        case.may_save()
    assert found.value.told_by == 0
    case.health.skipped_in_a_row = 2
    with pytest.raises(NumericsError, match="step 4 was too large: after it, even the gradient of its own samples"):
        case.take(BAD)


@pytest.mark.parametrize(
    ("precision", "steps", "results", "raised"),
    [
        ("fp32", 100, [BAD, BAD, BAD], NumericsError),
        ("fp32", 100, [BAD, BAD, GOOD, BAD, BAD], None),
        ("fp32", 100, [BAD, UNCOUNTED, BAD], NumericsError),
        ("fp32", 100, [UNCOUNTED, UNCOUNTED, UNCOUNTED], DataError),
        ("fp32", 100, [UNCOUNTED, UNCOUNTED, GOOD, UNCOUNTED, UNCOUNTED], None),
        ("fp32", 100, [UNCOUNTED, BAD, UNCOUNTED], None),
        ("fp32", 2, [GOOD, BAD], NumericsError),
        ("fp32", 2, [GOOD, UNCOUNTED], DataError),
        ("fp32", 2, [BAD, GOOD], None),
        ("fp16", 100, [BAD] * 29, None),
        ("fp16", 100, [BAD] * 30, NumericsError),
        ("fp16", 100, [UNCOUNTED] * 3, DataError),
        ("fp16", 100, [UNCOUNTED, UNCOUNTED, BAD, UNCOUNTED], None),
        ("fp16", 2, [GOOD, BAD], None),
        ("fp16", 2, [BAD, BAD], NumericsError),  # no step was taken at all
        ("fp16", 2, [GOOD, UNCOUNTED], DataError),
    ],
)  # fmt: skip
def test_how_many_skipped_steps_end_a_run(
    precision: str, steps: int, results: list[TrainStep], raised: type[Exception] | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = Case(monkeypatch, tmp_path, precision, steps)
    case.take(*results[:-1])
    assert not [line for line in case.lines if "optim/gave_up" in line]
    if raised is None:
        case.take(results[-1])
        assert not [line for line in case.lines if "optim/gave_up" in line]
        return
    with pytest.raises(raised) as found:
        case.take(results[-1])
    assert found.value.told_by == 0
    assert case.lines[-1]["optim/gave_up"] == int(raised is NumericsError)


def test_a_damaged_state_ends_the_run_at_the_first_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(monkeypatch, tmp_path)
    case.damage = ["weight"]
    case.take(GOOD, UNCOUNTED)
    with pytest.raises(NumericsError, match="step 3: the training state is damaged: the weight"):
        case.take(BAD)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([], "There is no checkpoint: the same command starts at step 0"),
        ([0], "The newest checkpoint is that of the imported weights"),
        ([0, 2, 4], "The newest checkpoint is that of step 4: the same command resumes there"),
    ],
)
def test_the_message_names_the_newest_checkpoint(
    steps: list[int], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "list_steps", lambda run_dir: steps)
    assert health.newest_checkpoint(Case(monkeypatch, tmp_path).run).startswith(sentence)
