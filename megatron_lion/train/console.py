"""Console output of a run, on stderr: a summary at its start and a progress line."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_lion.config import RunConfig
from megatron_lion.gradient.moving import window_cost
from megatron_lion.model.sizes import model_size
from megatron_lion.plain_text import plain
from megatron_lion.streams import say
from megatron_lion.train.dryrun import batch_sentence
from megatron_lion.train.run import Run

logger = logging.getLogger(__name__)


def announce(run: Run, *, resumed: bool, source: str | None = None) -> None:
    """Prints a summary of the run: the first process to stderr, every process to its log.

    Args:
        run: the run that is about to start.
        resumed: whether it continues from its own checkpoint.
        source: origin of the imported weights, or None if the weights are not imported.
    """
    config = run.config
    size = model_size(config.model, run.corpora.vocab_size)
    optimizer = config.optimizer
    betas = f" betas {optimizer.resolved_betas()}" if optimizer.name != "sgd" else f" momentum {optimizer.momentum}"
    tokens = config.train.steps * config.train.global_batch_size * config.model.seq_length
    epochs = tokens / max(1, run.corpora.train_tokens)
    lines = [
        f"{config.label}: {size.num_parameters:,} parameters (sqrt d {size.sqrt_d:,.1f}), {config.train.precision} on "
        f"{run.ranks.world_size} x {run.device.kind} (TP {run.ranks.tp_size}, PP {run.ranks.pp_size}, DP {run.ranks.dp_size})",
        f"{optimizer.name}: lr {optimizer.lr:g}, weight_decay {optimizer.weight_decay:g},{betas}, clip_grad {optimizer.clip_grad:g}; "
        f"{config.schedule.kind} schedule, {config.warmup_steps} warm-up steps",
        batch_sentence(config, run.ranks.world_size),
        f"{config.train.steps:,} steps = {tokens:,} tokens, {epochs:.2f} x the training data",
    ]
    if epochs > 1.05:
        lines.append(f"note: the training data is read {epochs:.1f} times")
    if config.probe.every and config.probe.mode == "moving":
        lines.append(window_cost(config, size.num_parameters, run.ranks))
    if source is not None:
        lines.append(f"starting from the imported weights of {source}")
    if resumed:
        lines.append(f"resuming after step {run.step:,}: checkpoint verified")
        if run.step >= config.train.steps:
            lines.append(f"nothing to do: the run is finished, all {config.train.steps:,} steps are done")
        elif run.step >= (config.train.stop_after or config.train.steps):
            lines.append(
                f"nothing to do: step {run.step:,} is done and train.stop_after (--max-steps) is {config.train.stop_after:,}; "
                "give a larger one, or none, to continue"
            )
    lines = [plain(line) for line in lines]  # the name of a run or of imported weights may come from elsewhere
    for line in lines:
        logger.info("%s", line)
    if run.ranks.is_main:
        say("\n".join(lines))  # not rich's console, which ends the process if stderr's reader has ended


class TrainProgress:
    """A progress line on a terminal; a plain line about every 15 seconds if stderr is not a terminal.

    Args:
        config: the run's settings.
        start: steps done before this job.
        shown: whether this process prints anything.
    """

    def __init__(self, config: RunConfig, *, start: int, shown: bool) -> None:
        self.total = config.train.steps
        self.label = config.optimizer.name
        self.shown = shown
        self._plain = sys.stderr is None or not sys.stderr.isatty()
        self._last_plain = 0.0
        self._started, self._start_step = time.monotonic(), start
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
            disable=not shown or self._plain,
        )
        self._task = self._progress.add_task(self.label, total=self.total, completed=start, facts="")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def update(self, step: int, values: dict[str, float | int | None]) -> None:
        """Shows step, loss (nats) and throughput (tokens per second) from the values of a log line."""
        loss, rate = values.get("train/loss") or 0.0, values.get("perf/tokens_per_s") or 0.0
        facts = f"loss {loss:.4f}  {rate:,.0f} tok/s"
        self._progress.update(self._task, completed=step, facts=facts)
        now = time.monotonic()
        if self.shown and self._plain and (now - self._last_plain > 15 or step == self.total):
            self._last_plain = now
            pace = (now - self._started) / max(1, step - self._start_step)
            end = datetime.datetime.now() + datetime.timedelta(seconds=pace * (self.total - step))
            say(f"{self.label}: step {step}/{self.total}  {facts}  done about {end:%Y-%m-%d %H:%M}")

    def note(self, text: str) -> None:
        """Shows what runs between the steps, such as a probe or a held-out measurement; "" removes it."""
        self._progress.update(self._task, description=f"{self.label} ({text})" if text else self.label)
