"""Console output of a run, on stderr: a summary at its start and a progress line."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from megatron_lion.config import RunConfig
from megatron_lion.gradient.moving import window_cost
from megatron_lion.model.sizes import model_size
from megatron_lion.plain_text import plain
from megatron_lion.streams import say, stderr_is_terminal
from megatron_lion.train.dryrun import batch_sentence, passes_warning, split_warning
from megatron_lion.train.run import Run

logger = logging.getLogger(__name__)

LINE_WIDTH = 100
"""Columns of a progress line at most, also on a wider terminal."""
SHORTEST_BAR, LONGEST_BAR = 5, 20
PLAIN_INTERVAL_S = 15


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
        f"{config.train.steps:,} steps = {tokens:,} tokens = {epochs:,.2f} x the {run.corpora.train_tokens:,} of the training data",
    ]
    warnings = passes_warning(config, run.corpora.train_tokens), split_warning(config)
    lines += [f"warning: {warning}" for warning in warnings if warning is not None]
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


@dataclass
class ProgressFields:
    """The numbers of a progress line, as far as they are known; `update` takes them from the values of metrics.jsonl.

    Attributes:
        loss, valid_loss: nats.
        ratio: ‖g‖₁ / (‖g‖₂ √d) of the latest probe.
        lr: learning rate.
        skipped: steps skipped so far because a gradient was not finite.
        rate: tokens per second.
    """

    loss: float | None = None
    valid_loss: float | None = None
    ratio: float | None = None
    lr: float | None = None
    skipped: int = 0
    rate: float | None = None

    def update(self, values: Mapping[str, Any]) -> None:
        """Takes over the values that a line of metrics.jsonl has; the others stay."""
        self.loss = values.get("train/loss", self.loss)
        self.valid_loss = values.get("valid/loss", self.valid_loss)
        self.ratio = values.get("probe/norm_ratio_over_sqrt_d", self.ratio)
        self.lr = values.get("optim/lr", self.lr)
        self.skipped = values.get("optim/skipped_steps") or self.skipped
        self.rate = values.get("perf/tokens_per_s", self.rate)

    def text(self, width: int) -> str:
        """Returns the fields that fit into `width` columns; those that matter least are left out first.

        Example:
            >>> fields = ProgressFields(loss=3.2145, lr=1e-5, valid_loss=3.3011, ratio=0.41234, rate=12345.6)
            >>> fields.text(80)
            'loss 3.2145  valid 3.3011  r/sqrt d 0.4123  lr 1.00e-05  12,346 tok/s'
            >>> fields.text(40)
            'loss 3.2145  valid 3.3011'
            >>> ProgressFields(loss=3.2145, skipped=2).text(40)
            'loss 3.2145  2 skipped'
        """
        # In the order of the line; the number is the order in which they get their place.
        fields = [
            (0, "loss {:.4f}", self.loss),
            (2, "valid {:.4f}", self.valid_loss),
            (3, "r/sqrt d {:.4f}", self.ratio),
            (4, "lr {:.2e}", self.lr),
            (1, "{:,} skipped", self.skipped or None),
            (5, "{:,.0f} tok/s", self.rate),
        ]
        known = [(place, form.format(value)) for place, form, value in fields if value is not None]
        kept: set[int] = set()
        for place, text in sorted(known):
            if len(text) + 2 * len(kept) + sum(len(other) for rank, other in known if rank in kept) > width:
                break
            kept.add(place)
        return "  ".join(text for place, text in known if place in kept)


class _Line(ProgressColumn):
    """The whole progress line, at most `LINE_WIDTH` columns: step, a bar if there is room, the fields that fit, time left."""

    def __init__(self, fields: ProgressFields, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._fields, self._console = fields, console
        self._full, self._empty = ("#", ".") if console.options.ascii_only else ("━", "─")

    def render(self, task: Task) -> Text:
        """Renders the line for the terminal's present width."""
        width = min(self._console.width, LINE_WIDTH)
        total = int(task.total or 0)
        left = "-:--:--" if task.time_remaining is None else str(datetime.timedelta(seconds=int(task.time_remaining)))
        end = f"  {left} left"
        start = f"{task.description}  {int(task.completed):>{len(str(total))}}/{total}"
        facts = self._fields.text(width - len(start) - len(end) - 2)
        facts = f"  {facts}" if facts else ""
        room = min(width - len(start) - len(facts) - len(end) - 2, LONGEST_BAR)
        bar = ""
        if room >= SHORTEST_BAR:
            done = round(room * min(1.0, task.completed / max(1, total)))
            bar = "  " + self._full * done + self._empty * (room - done)
        return Text(f"{start}{bar}{facts}{end}"[:width], no_wrap=True)


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
        self.fields = ProgressFields()
        self._plain = not stderr_is_terminal()
        self._last_plain = 0.0
        self._is_complete = False
        self._started, self._start_step = time.monotonic(), start
        console = Console(stderr=True)
        self._progress = Progress(
            _Line(self.fields, console),
            console=console,
            transient=False,
            disable=not shown or self._plain,
        )
        self._task = self._progress.add_task(self.label, total=self.total, completed=start)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._is_complete:
            self._print_plain(self.total)

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows step, loss (nats), learning rate, skipped steps and throughput from the values of a log line."""
        self.fields.update(values)
        self._progress.update(self._task, completed=step)
        # The last step's line comes at the end, with the measurements that follow the step.
        self._is_complete = step == self.total
        if time.monotonic() - self._last_plain > PLAIN_INTERVAL_S and not self._is_complete:
            self._print_plain(step)

    def measured(self, values: Mapping[str, Any]) -> None:
        """Shows the validation loss and the norm ratio of a measurement between two steps, until the next one."""
        self.fields.update(values)
        self._progress.refresh()

    def note(self, text: str) -> None:
        """Shows what runs between the steps, such as a probe or a held-out measurement; "" removes it."""
        self._progress.update(self._task, description=f"{self.label} ({text})" if text else self.label)

    def _print_plain(self, step: int) -> None:
        if not (self.shown and self._plain):
            return
        now = time.monotonic()
        self._last_plain = now
        pace = (now - self._started) / max(1, step - self._start_step)
        end = datetime.datetime.now() + datetime.timedelta(seconds=pace * (self.total - step))
        start, done = f"{self.label}: step {step}/{self.total}  ", f"  done about {end:%Y-%m-%d %H:%M}"
        if step == self.total:
            done = ""
        say(f"{start}{self.fields.text(LINE_WIDTH - len(start) - len(done))}{done}")
