"""Values that are not finite, and diverging runs: code 6, and no checkpoint ever holds one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tiny
import torch

from faults.lab import Lab, committed, digest, losses
from faults.rows import Tally, case
from faults.warm import Stuck
from megatron_lion.config import RunConfig

FAMILY = "numbers"
RUN: dict[str, Any] = {"train__steps": 8, "checkpoint__every": 1, "checkpoint__keep": 2}


def poison(value: float, where: str, model: Any, optimizer: Any, *rest: Any, **keywords: Any) -> None:
    """Sets one element of the weights or of the optimizer's state; called with the arguments of train_step."""
    with torch.no_grad():
        if where == "weight":
            list(model[0].parameters())[3].view(-1)[1] = value
            return
        states = [state for state in optimizer.inner.state.values() if state]
        tensors = [
            tensor for state in states for tensor in state.values() if torch.is_tensor(tensor) and tensor.numel() > 8
        ]
        tensors[len(tensors) // 2].view(-1)[1] = value


def nan_in_state(*arguments: Any, **keywords: Any) -> None:
    poison(math.nan, "state", *arguments, **keywords)


def inf_in_state(*arguments: Any, **keywords: Any) -> None:
    poison(math.inf, "state", *arguments, **keywords)


def nan_in_weight(*arguments: Any, **keywords: Any) -> None:
    poison(math.nan, "weight", *arguments, **keywords)


def not_finite(run_dir: str) -> list[str]:
    """Tensors of a run's checkpoints that hold a value that is not finite."""
    found = []
    for step in committed(run_dir):
        for name, tensor in tiny.read_weights(run_dir, step, prefix="").items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                found.append(f"step {step}: {name}")
    return found


def ends_with_6(lab: Lab, tally: Tally, config: RunConfig, layout: str, what: str, **options: Any) -> bool:
    """Runs a command that must end with 6 and leave only finite checkpoints; whether it ended."""
    tally.injected += 1
    try:
        job = lab.run(config, layout, **options)
    except Stuck as error:
        tally.verdict(what, "stuck", str(error))
        return False
    for rank in job.ranks:
        assert rank.code is not None
        tally.code(what, rank.code, (6,), rank.errors)
    if bad := not_finite(config.run_dir):
        tally.wrong.append(f"{what}: {len(bad)} tensors of checkpoints are not finite, first {bad[0]}")
    newest = max(committed(config.run_dir), default=0)
    if newest and f"step {newest}" not in job.errors:
        tally.wrong.append(f"{what}: the message does not name the last good step {newest}: {job.ranks[0].last_line()}")
    return True


@case(
    "nonfinite-state",
    FAMILY,
    "NaN or inf in one element of a weight or of the optimizer's state",
    "6; then the twin's end",
)
def state(lab: Lab, tally: Tally) -> None:
    plans = [
        (layout, optimizer, action)
        for layout, optimizer in (("DP1", "lion"), ("DP2", "lion"), ("TP2", "lion"), ("DP1", "adamw"), ("DP1", "sgd"))
        for action in ("nan_in_state", "inf_in_state", "nan_in_weight")
        if not (optimizer == "sgd" and "state" in action)
    ]
    for layout, optimizer, action in lab.some(plans):
        config = lab.config("poisoned", **RUN, optimizer__name=optimizer)
        what = f"{layout} {optimizer} {action}"
        hook = ("step", 4, f"faults.cases_numbers:{action}", str(Path(f"{config.run_dir}.marker")))
        if ends_with_6(lab, tally, config, layout, what, hooks={0: hook}):
            lab.judge(tally, what, config, layout)


def drift(model: Any, *rest: Any, **keywords: Any) -> None:
    """Changes one element of a parameter that every tensor-parallel rank has whole."""
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            if "layernorm" in name.replace("_", "") or "layer_norm" in name:
                parameter.view(-1)[0] += 0.5
                return
    raise AssertionError("no layer norm")


@case(
    "replica-drift",
    FAMILY,
    "a layer norm changes on one of two tensor-parallel ranks",
    "known gap: replicas are not compared",
)
def replica_drift(lab: Lab, tally: Tally) -> None:
    config = lab.config("drift", **RUN)
    twin = lab.twin(config, "TP2")
    hook = ("step", 4, "faults.cases_numbers:drift", str(Path(f"{config.run_dir}.marker")))
    tally.injected += 1
    job = lab.run(config, "TP2", hooks={1: hook})
    for rank in job.ranks:
        assert rank.code is not None
        tally.code("drift", rank.code, (0, 4, 6), rank.errors)
    found = all(rank.code for rank in job.ranks)
    if not found and digest(config.run_dir, twin.step) == twin.digest:
        tally.wrong.append("the drift had no effect: the case injects nothing")
    tally.verdict("drift", "recovered" if found else "open")


@case("divergence", FAMILY, "rates at which a run diverges", "6, or finite to its end")
def divergence(lab: Lab, tally: Tally) -> None:
    for optimizer, rate in lab.some([("lion", 10.0), ("lion", 1e20), ("lion", 3e38), ("sgd", 1e30), ("adamw", 1e30)]):
        config = lab.config("diverging", **RUN, optimizer__name=optimizer, optimizer__lr=rate)
        what = f"{optimizer} at rate {rate:g}"
        tally.injected += 1
        try:
            (rank,) = lab.run(config).ranks
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            continue
        assert rank.code is not None
        tally.code(what, rank.code, (6, 0), rank.errors)
        bad = not_finite(config.run_dir)
        if bad:
            tally.verdict(what, "stuck", f"{len(bad)} tensors of checkpoints are not finite, first {bad[0]}")
        elif rank.code == 0 and not all(map(math.isfinite, losses(config.run_dir))):
            tally.verdict(what, "silent", "exit 0 with a loss that is not finite")
        else:
            tally.verdict(what, "recovered")
