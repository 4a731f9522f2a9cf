"""The learning rate of each step, as a pure function of the step."""

from __future__ import annotations

import math

from megatron_lion.config import RunConfig


def lr_at(config: RunConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (the first step is 1).

    Warm-up: lr · step / warmup_steps. Afterwards, t is the fraction of the remaining steps done (1 at the last step):
    cosine  min + (lr - min)(1 + cos πt)/2 · linear  lr - (lr - min) t · constant  lr ·
    inverse_sqrt  max(min, lr · √(w / step)), w = max(1, warmup_steps) · wsd  lr, then linear to min over the last
    `wsd_decay_fraction` of the steps: at least one step, and none if it is 0.

    The last step has exactly the rate min. With min 0 it moves no weight and changes only the optimizer's state; that is
    kept because published schedules end so. A run of one step is not all end: it has the rate lr. With warmup_steps
    equal to the number of steps the run ends at lr.

    Example:
        >>> from megatron_lion.config import OptimizerConfig, TrainConfig
        >>> run = RunConfig(optimizer=OptimizerConfig(lr=1.0), train=TrainConfig(steps=100))
        >>> lr_at(run, 1), lr_at(run, 100)
        (1.0, 0.0)
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup, total = config.warmup_steps, config.train.steps
    if step < warmup:
        return peak * step / warmup
    if total == 1 or schedule.kind == "constant" or (schedule.kind == "wsd" and schedule.wsd_decay_fraction == 0):
        return peak
    if schedule.kind == "inverse_sqrt":
        return max(schedule.min_lr, peak * math.sqrt(max(1, warmup) / max(1, step, warmup)))
    if schedule.kind == "wsd":
        decay_steps = max(1, round(schedule.wsd_decay_fraction * total))
        done = max(0.0, (step - (total - decay_steps)) / decay_steps)
        return _line(peak, schedule.min_lr, done)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule.kind == "linear":
        return _line(peak, schedule.min_lr, done)
    return schedule.min_lr + (peak - schedule.min_lr) * (1.0 + math.cos(math.pi * done)) / 2.0


def _line(peak: float, low: float, done: float) -> float:
    # With rounding the formula can miss `low` by an ulp at the end: 0.3 - (0.3 - 0.03) is below 0.03.
    return low if done >= 1.0 else peak - (peak - low) * done


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a positive multiple of `every`; False if `every` is 0."""
    return every > 0 and step > 0 and step % every == 0
