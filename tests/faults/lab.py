"""Small runs, their undisturbed twins, and the verdict on a run that was disturbed.

The verdict does not use the product's fingerprint: it compares every tensor of the last checkpoint, read by torch's own
reader, the random states, and the logged losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch

from faults.rows import Tally
from faults.shim import Call, Fault, read_log
from faults.warm import GENEROUS_S, Forked, Stuck, Warm
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config
from megatron_lion.jobs import STORE

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
LAYOUTS = {name: tiny.LAYOUTS[name] for name in ("DP1", "DP2", "TP2")}


def digest(run_dir: Path | str, step: int) -> str:
    """SHA-256 over all tensors and random states of a checkpoint, in the order of their names."""
    total = hashlib.sha256()
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # torch's reader works without it
    for name, tensor in sorted(tiny.read_weights(run_dir, step, prefix="").items()):
        total.update(name.encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    for path in sorted(Path(run_dir, "checkpoints", f"step_{step:07d}").glob("rng_*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


@dataclass
class Job:
    """The processes of one run, in rank order."""

    ranks: list[Forked]

    def wait(self, limit_s: float = GENEROUS_S) -> list[int]:
        """Waits for all; kills them after the limit and raises Stuck."""
        deadline = time.monotonic() + limit_s
        try:
            return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]
        except Stuck:
            self.kill()
            raise

    def kill(self) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL, group=True)
        self.ranks[0].server.until(lambda: all(rank.code is not None for rank in self.ranks), 30)

    @property
    def errors(self) -> str:
        return "".join(rank.errors for rank in self.ranks)


@dataclass(frozen=True)
class Twin:
    """The undisturbed run: digest of its last checkpoint, and the logged losses."""

    digest: str
    losses: list[float]
    step: int


class Lab:
    """A folder, a server of processes, and a corpus.

    Args:
        folder: for runs; removed by the caller.
        server: a started server.
        limit: longest list that `some` returns; 0, or the variable FAULTS_LIMIT, for all.
    """

    def __init__(self, folder: Path, server: Warm, limit: int = 0) -> None:
        self.folder, self.server, self.limit = folder, server, limit or int(os.environ.get("FAULTS_LIMIT", "0"))
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus = tiny.write_corpus(folder / "corpus")
        self._twins: dict[str, Twin] = {}
        self.count = 0

    def some[T](self, items: Sequence[T]) -> list[T]:
        """All items, or `limit` of them, evenly spaced."""
        if not self.limit or len(items) <= self.limit:
            return list(items)
        return [items[number * len(items) // self.limit] for number in range(self.limit)]

    def config(self, name: str = "", **changes: Any) -> RunConfig:
        """Settings of a small run in a new folder."""
        self.count += 1
        return tiny.tiny_config(self.folder / f"{name or 'run'}-{self.count}", self.corpus, **{**DROPOUT, **changes})

    def start(
        self, config: RunConfig, layout: str = "DP1", faults: dict[int, Fault] | None = None, *,
        words: tuple[str, ...] = (), hooks: dict[int, tuple[str, ...]] | None = None,
    ) -> Job:  # fmt: skip
        """Starts `pretrain` as its command line does, at a layout.

        Args:
            config: the settings; the layout's are added.
            layout: a name of tiny.LAYOUTS.
            faults: a fault for each rank that gets one.
            words: further words of the command line.
            hooks: arguments of work.at_phase for each rank that gets a hook.
        """
        size, changes = tiny.LAYOUTS[layout]
        path = Path(f"{config.run_dir}.{layout}.yaml")
        path.write_text(dump_config(changed(config, changes)))
        command = ["pretrain", "--config", str(path), *words]
        ranks: list[Forked] = []
        self.count += 1
        store = f"{config.run_dir}.store-{self.count}"  # as the launcher gives it to the ranks of one node
        for rank in range(size):
            environment = {} if size == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", STORE: store,
            }  # fmt: skip
            hook = (hooks or {}).get(rank)
            work = ("faults.work:at_phase", *hook, command) if hook else ("faults.work:command", command)
            ranks.append(self.server.start(*work, environment=environment, fault=(faults or {}).get(rank)))
        return Job(ranks)

    def run(self, config: RunConfig, layout: str = "DP1", limit_s: float = GENEROUS_S, **options: Any) -> Job:
        """Starts and waits for the end.

        Raises:
            Stuck: it did not end.
        """
        job = self.start(config, layout, **options)
        job.wait(limit_s)
        return job

    def twin(self, config: RunConfig, layout: str = "DP1") -> Twin:
        """The undisturbed run with these settings; made once."""
        key = dump_config(changed(config, {"run_dir": "", "checkpoint__keep": 1})) + layout
        if key not in self._twins:
            self.count += 1
            own = changed(config, {"run_dir": str(self.folder / f"twin-{self.count}")})
            job = self.run(own, layout)
            assert [rank.code for rank in job.ranks] == [0] * len(job.ranks), job.errors[-2000:]
            self._twins[key] = Twin(digest(own.run_dir, own.train.steps), losses(own.run_dir), own.train.steps)
        return self._twins[key]

    def copy(self, config: RunConfig, name: str = "copy") -> RunConfig:
        """A copy of a run's folder, with settings that point to it."""
        self.count += 1
        target = self.folder / f"{name}-{self.count}"
        shutil.copytree(config.run_dir, target, symlinks=True)
        return changed(config, {"run_dir": str(target)})

    def calls(self, config: RunConfig, layout: str = "DP1", rank: int = 0, **options: Any) -> list[Call]:
        """Runs without a fault and returns the counted calls of a rank."""
        log = Path(f"{config.run_dir}.calls")
        job = self.run(config, layout, faults={rank: Fault(config.run_dir, log=str(log))}, **options)
        assert [one.code for one in job.ranks] == [0] * len(job.ranks), job.errors[-2000:]
        return read_log(log)[0]

    def judge(self, tally: Tally, what: str, config: RunConfig, layout: str = "DP1", **options: Any) -> str:
        """Runs the same command again, compares with the twin, counts the outcome, and removes the folder."""
        twin = self.twin(config, layout)
        tally.lost = max(tally.lost, steps_lost(config.run_dir))
        try:
            job = self.run(config, layout, **options)
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            return "stuck"
        outcome, detail = "recovered", ""
        if any(rank.code for rank in job.ranks):
            failed = next(rank for rank in job.ranks if rank.code)
            outcome, detail = "stuck", f"{failed.code}: {failed.last_line()}"
        else:
            try:
                if digest(config.run_dir, twin.step) != twin.digest:
                    outcome, detail = "silent", "other tensors than the twin's"
                elif losses(config.run_dir) != twin.losses:
                    outcome, detail = "silent", "other logged losses than the twin's"
            except Exception as error:
                outcome, detail = "silent", f"exit 0, and the last checkpoint cannot be read: {error}"
        tally.verdict(what, outcome, detail)
        if outcome == "recovered":
            self.clean(config)
        return outcome

    def clean(self, config: RunConfig) -> None:
        """Removes a run's folder and what was written beside it."""
        shutil.rmtree(config.run_dir, ignore_errors=True)
        for path in Path(config.run_dir).parent.glob(f"{Path(config.run_dir).name}.*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    def until_lines(self, job: Job, run_dir: str, count: int) -> None:
        """Waits until metrics.jsonl has that many lines, or a rank has ended."""
        path = Path(run_dir, "metrics.jsonl")

        def reached() -> bool:
            return any(rank.code is not None for rank in job.ranks) or (
                path.exists() and path.read_bytes().count(b"\n") >= count
            )

        self.wait_for(reached)

    def wait_for(self, condition: Callable[[], bool], limit_s: float = GENEROUS_S) -> None:
        """Waits for a condition; raises Stuck after a generous limit."""
        if not self.server.until(condition, limit_s):
            raise Stuck("the awaited state was not reached")


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A copy of settings with changes, dotted keys with `__` for the dot."""
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        if section:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def losses(run_dir: Path | str) -> list[float]:
    """Logged training losses, one a step: the last line of a step counts."""
    found: list[float] = tiny.outcome(run_dir)["losses"]
    return found


def committed(run_dir: Path | str) -> list[int]:
    """Steps of checkpoint folders that have a manifest; read without the product's own functions."""
    return sorted(int(path.parent.name[5:]) for path in Path(run_dir).glob("checkpoints/step_???????/manifest.json"))


def steps_lost(run_dir: Path | str) -> int:
    """Last logged step less the newest checkpoint's; all steps if there is no checkpoint."""
    path = Path(run_dir, "metrics.jsonl")
    if not path.exists():
        return 0
    last = 0
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{") and line.endswith("}") and '"step"' in line:
            last = max(last, int(json.loads(line).get("step", 0)))
    return max(0, last - max(committed(run_dir), default=0))
