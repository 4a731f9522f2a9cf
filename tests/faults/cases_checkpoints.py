"""Checkpoints that are not this run's, not this step's, damaged, hostile or gone: refused, or the run ends as its twin."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lab import Lab, changed, digest
from faults.rows import Tally, case
from faults.shim import Fault, read_log
from faults.warm import Stuck
from megatron_lion.config import RunConfig

FAMILY = "checkpoints"
RUN: dict[str, Any] = {"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 0}
HALF = ("--max-steps", "4")


def step(config: RunConfig, number: int) -> Path:
    return Path(config.run_dir, "checkpoints", f"step_{number:07d}")


def stated_again(folder: Path, **changes: Any) -> None:
    """Writes a manifest again so that its digests fit the files and `changes`, as a forger would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.update(changes)
    total = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": total}))


@dataclass(frozen=True)
class Harm:
    """What is done to a run's folder, and the exit codes that are right; 0 only with the twin's end."""

    do: Callable[[RunConfig, RunConfig], Any]
    codes: tuple[int, ...] = (4,)


def _swap(config: RunConfig, one: int, other: int) -> None:
    away = step(config, one).with_name("away")
    os.replace(step(config, one), away)
    os.replace(step(config, other), step(config, one))
    os.replace(away, step(config, other))


def _foreign(config: RunConfig, other: RunConfig) -> None:
    shutil.rmtree(step(config, 4))
    shutil.copytree(step(other, 4), step(config, 4))


HARMS: dict[str, Harm] = {
    "step 2 copied as step 6": Harm(lambda run, other: shutil.copytree(step(run, 2), step(run, 6))),
    "steps 2 and 4 swapped": Harm(lambda run, other: _swap(run, 2, 4)),
    "step 4 of another run (seed, rate)": Harm(_foreign),
    "a shard of step 2 in step 4": Harm(lambda run, other: shutil.copy(step(run, 2) / "__0_0.distcp", step(run, 4))),
    "a huge step number": Harm(lambda run, other: os.replace(step(run, 4), step(run, 4).with_name("step_" + "9" * 20)), (4, 0)),
    "newest folder without manifest": Harm(lambda run, other: (step(run, 4) / "manifest.json").unlink()),
    "newest manifest empty": Harm(lambda run, other: (step(run, 4) / "manifest.json").write_bytes(b"")),
    "checkpoints deleted": Harm(lambda run, other: shutil.rmtree(step(run, 4).parent)),
    "checkpoints emptied": Harm(lambda run, other: [shutil.rmtree(step(run, number)) for number in (2, 4)]),
    "checkpoints renamed": Harm(lambda run, other: os.replace(step(run, 4).parent, f"{run.run_dir}/old")),
    "config.yaml gone": Harm(lambda run, other: Path(run.run_dir, "config.yaml").unlink(), (2, 4, 0)),
    "pointer torn": Harm(lambda run, other: Path(run.run_dir, "checkpoints", "latest").write_bytes(b"step_00"), (0,)),
}  # fmt: skip


class Half:
    """A run of 6 steps that was stopped at step 4, and one of another seed; cases damage copies of it."""

    def __init__(self, lab: Lab) -> None:
        self.run, self.other = lab.config("half", **RUN), lab.config("other", **RUN, seed=99, optimizer__lr=5e-3)
        for config in (self.run, self.other):
            assert [rank.code for rank in lab.run(config, words=HALF).ranks] == [0]


def resume(lab: Lab, tally: Tally, config: RunConfig, what: str, codes: tuple[int, ...]) -> None:
    """Runs the same command after the damage: a code of `codes`, one line, and with 0 the twin's tensors."""
    twin = lab.twin(lab.config("twin", **RUN))
    tally.injected += 1
    try:
        (rank,) = lab.run(config).ranks
    except Stuck as error:
        tally.verdict(what, "stuck", str(error))
        return
    assert rank.code is not None
    if rank.code == 0:
        same = step(config, twin.step).is_dir() and digest(config.run_dir, twin.step) == twin.digest
        tally.codes["0"] += 1
        if not same or 0 not in codes:
            tally.verdict(what, "silent", f"exit 0, {'the same' if same else 'other'} tensors, wanted {codes}")
            return
    else:
        tally.code(what, rank.code, codes, rank.errors)
    tally.verdict(what, "recovered")
    lab.clean(config)


@case(
    "checkpoint-identity",
    FAMILY,
    "folders that are swapped, copied, foreign, incomplete or gone",
    "4, or the twin's end",
)
def identity(lab: Lab, tally: Tally) -> None:
    half = Half(lab)
    for what, harm in lab.some(list(HARMS.items())):
        config = lab.copy(half.run)
        harm.do(config, half.other)
        resume(lab, tally, config, what, harm.codes)


@case("checkpoint-flips", FAMILY, "one bit of any file of a checkpoint, 100 bits each, by verification", "refused")
def flips(lab: Lab, tally: Tally) -> None:
    from megatron_lion.errors import CheckpointError
    from megatron_lion.runs.steps import open_checkpoint
    from megatron_lion.train.checkpoint import verify_checkpoint

    chosen = random.Random(1)
    folder = step(Half(lab).run, 4)
    verify_checkpoint(open_checkpoint(folder))
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(lab.limit or 100):
            bit = chosen.randrange(8 * len(content))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            tally.injected += 1
            what = f"{path.name} bit {bit}"
            try:
                verify_checkpoint(open_checkpoint(folder))
                tally.verdict(what, "silent", "accepted")
            except CheckpointError:
                tally.verdict(what, "recovered")
            except Exception as error:
                tally.verdict(what, "stuck", f"untyped {error!r}")
        path.write_bytes(content)


@case(
    "checkpoint-flip-written",
    FAMILY,
    "one bit inverted on its way to the disk, every write of a save",
    "4, or the twin's end",
)
def flips_on_the_way(lab: Lab, tally: Tally) -> None:
    first = lab.config("counted", **RUN)
    calls = lab.calls(first, words=HALF)
    writes = [call for call in calls if "/step_0000004" in call.path and call.takes("flip")]
    for call in lab.some(writes):
        config = lab.config("flip", **RUN)
        log = f"{config.run_dir}.log"
        lab.run(config, words=HALF, faults={0: Fault(config.run_dir, "flip", call.number, log=log)})
        if read_log(log)[1]:
            resume(lab, tally, config, f"flip at call {call.number} ({Path(call.path).name})", (4, 0))


WRONG_VALUES: tuple[Any, ...] = (None, -5, 7, 10**30, "x", [], {}, True, 0.5)


@case("checkpoint-manifest", FAMILY, "wrong types and values in a manifest whose digest fits", "4, or the twin's end")
def manifest_values(lab: Lab, tally: Tally) -> None:
    half = Half(lab)
    keys = sorted(set(json.loads((step(half.run, 4) / "manifest.json").read_text())) - {"sha256", "files"})
    plans: list[tuple[str, Any]] = [(key, value) for key in keys for value in WRONG_VALUES]
    for key, value in lab.some(plans[:: 1 if lab.limit else 2]):
        config = lab.copy(half.run)
        stated_again(step(config, 4), **{key: value})
        resume(lab, tally, config, f"{key} = {value!r}", (4, 0))


@case("checkpoint-paths", FAMILY, "manifests and links that lead out of a checkpoint's folder", "4")
def paths(lab: Lab, tally: Tally) -> None:
    half = Half(lab)
    secret = lab.folder / "secret"
    secret.write_text("not of this run")
    stated = {"bytes": 15, "sha256": hashlib.sha256(b"not of this run").hexdigest()}
    for name in lab.some([str(secret), "../../../secret", "./../manifest.json", "a/../../../../secret", "sub/secret"]):
        config = lab.copy(half.run)
        files = json.loads((step(config, 4) / "manifest.json").read_text())["files"]
        stated_again(step(config, 4), files={**files, name: stated})
        resume(lab, tally, config, f"file {name}", (4,))
    for name in ("__0_0.distcp", ".metadata", "manifest.json"):
        config = lab.copy(half.run)
        outside = lab.folder / f"outside-{tally.injected}"
        os.replace(step(config, 4) / name, outside)
        (step(config, 4) / name).symlink_to(outside)
        resume(lab, tally, config, f"{name} is a link out of the folder", (4, 0))


@case("settings-changed", FAMILY, "another seed, rate or data for a run that has begun", "4")
def settings(lab: Lab, tally: Tally) -> None:
    half = Half(lab)
    for key, value in (("seed", 99), ("optimizer__lr", 5e-3), ("optimizer__weight_decay", 0.5), ("train__steps", 9)):
        config = changed(lab.copy(half.run), {key: value})
        resume(lab, tally, config, f"{key} = {value}", (4,))
