"""Checkpoints opened at every other layout: all 42 ordered pairs, three optimizers, every tensor bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import tiny

from faults.lab import Lab, changed
from faults.rows import Tally, case
from megatron_lion.config import RunConfig

FAMILY = "layouts"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: tiny.LAYOUTS[name] for name in ("DP1", "DP2", "DP4", "TP2", "PP2", "TP2xPP2")}, "DP3": (3, {}),
}  # fmt: skip
RUN: dict[str, Any] = {"train__steps": 2, "train__global_batch_size": 12, "checkpoint__every": 0}


def tensors(run_dir: str, step: int) -> dict[str, str]:
    """SHA-256 of each tensor of a checkpoint, read whole by torch's own reader."""
    found = tiny.read_weights(run_dir, step, prefix="")
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in found.items()}


def saved_again(rank: int, configs: dict[str, tuple[RunConfig, str]]) -> dict[str, str]:
    """Work of one process: opens each checkpoint at this layout and saves it, unchanged, in a separate folder.

    Returns:
        The traceback of each that failed, or "".
    """
    import traceback

    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    results = {}
    for name, (config, target) in configs.items():
        results[name] = ""
        try:
            with tiny.opened_run(config) as run:
                restore_run(run, tiny.newest_checkpoint(config.run_dir))
                run.config = changed(config, {"run_dir": target})
                save_run(run)
        except Exception:
            results[name] = traceback.format_exc()
    return results


def pairs(lab: Lab, tally: Tally, optimizer: str) -> None:
    """Saves at each layout and opens at each other one."""
    from distributed import run_distributed

    rates = {"sgd": 0.1}
    chosen = lab.some(list(LAYOUTS))
    sources = {
        name: (LAYOUTS[name][0], lab.config(f"{optimizer}-{name}", **RUN, optimizer__name=optimizer,
               optimizer__lr=rates.get(optimizer, 1e-3), **LAYOUTS[name][1]))
        for name in chosen
    }  # fmt: skip
    for name, outcome in tiny.run_all(sources).items():
        assert "failed" not in outcome, (name, outcome)
    for target in chosen:
        size, changes = LAYOUTS[target]
        plain = {"parallel__tensor_model_parallel_size": 1, "parallel__pipeline_model_parallel_size": 1}
        jobs = {}
        for source in chosen:
            if source != target:
                config = sources[source][1]
                jobs[source] = (changed(config, {**plain, **changes}), f"{config.run_dir}-at-{target}")
        found = run_distributed(saved_again, size, jobs)[0]
        for source, (config, folder) in jobs.items():
            tally.injected += 1
            what = f"{optimizer} {source} to {target}"
            if found[source]:
                tally.verdict(what, "stuck", found[source].strip().splitlines()[-1])
                continue
            before, after = tensors(config.run_dir, RUN["train__steps"]), tensors(folder, RUN["train__steps"])
            differ = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            if differ:
                tally.verdict(what, "silent", f"{len(differ)} of {len(before)} tensors differ, first {differ[0]}")
            else:
                tally.verdict(what, "recovered")


def _register() -> None:
    for optimizer in ("lion", "adamw", "sgd"):

        def work(lab: Lab, tally: Tally, optimizer: str = optimizer) -> None:
            pairs(lab, tally, optimizer)

        text = f"{optimizer}: saved at one of 7 layouts, opened at each other"
        case(f"layouts-{optimizer}", FAMILY, text, "all tensors bit for bit")(work)


_register()
