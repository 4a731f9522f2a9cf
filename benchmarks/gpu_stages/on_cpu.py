"""The CPU process of stage `run`, which has no GPU: a tiny model's numbers, and a checkpoint restored and saved.

python -m gpu_stages.on_cpu REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config
from megatron_lion.device import Device, select_device
from megatron_lion.gradient.full_gradient import probe_run
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.runs.steps import find_latest
from megatron_lion.train.restore import restore_run
from megatron_lion.train.run import save_run

from .runs import built, fingerprints, take_step


def tiny_numbers(config: RunConfig, device: Device, ranks: Ranks) -> dict[str, Any]:
    """Numbers that must not depend on the device: initial weights bit for bit, a probe's norms and a loss to rounding."""
    with built(config, device, ranks) as (run, batches):
        weights = fingerprints(run)[1]
        probe = probe_run(run)
        assert probe is not None
        metrics = probe.metrics()
        names = ("probe/grad_l1", "probe/grad_l2", "probe/grad_linf", "probe/kkt_residual", "probe/loss")
        return {
            "weights": weights,
            "first_loss": take_step(run, batches).loss,
            **{name: metrics[name] for name in names},
        }


def load_and_save(
    source: RunConfig, target: Path, device: Device, ranks: Ranks, *, found_in: Path | None = None
) -> tuple[str, str]:
    """Restores the newest checkpoint of a run on this device, saves it in another folder, and takes one more step.

    Restoring compares fingerprints. The step uses the dropout streams, whose states differ between kinds of devices.
    """
    checkpoint = find_latest(found_in or Path(source.run_dir))
    assert checkpoint is not None
    one_more = replace(source, train=replace(source.train, steps=checkpoint.step + 1))
    with built(one_more, device, ranks) as (run, _):
        restore_run(run, checkpoint)
        run.config = replace(source, run_dir=str(target))
        save_run(run)
        found = fingerprints(run)
        run.config = one_more
        take_step(run, run.train_batches())
    return found


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    device = select_device("cpu")
    answer: dict[str, Any] = {}
    with process_groups(device) as ranks:
        config = load_config(Path(request["tiny_config"]))
        answer["tiny"] = tiny_numbers(replace(config, device="cpu"), device, ranks)
        run_dir = Path(request["run_dir"])
        while not list(
            run_dir.glob("checkpoints/step_*/manifest.json")
        ):  # the run trains at the same time; the parent process kills this one at its limit
            time.sleep(0.05)
        run = replace(load_config(run_dir / "config.yaml"), device="cpu")
        answer["fingerprints"] = load_and_save(run, Path(request["target"]), device, ranks)
    path = Path(sys.argv[2])
    path.with_suffix(".tmp").write_text(json.dumps(answer))
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
