"""Judges skipped steps and whether a state may be saved; ends a run that cannot go on, and names the cause.

A step is skipped, on all ranks alike, if a gradient is not finite or if the loss counts nothing. The state after a skipped
step is that before it. It is not saved even so: as long as steps are skipped, it is not known whether the state is
usable. A save that is due waits for the next step that is taken.

A finite state may be dead as well: after a step that was too large, every later gradient is NaN. Before a save, the
gradient of the step's last micro-batch is therefore taken again. It was finite before the step, so if it is not finite
after it, the state is at fault and not the data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_lion.errors import DataError, MegatronLionError, NumericsError
from megatron_lion.gradient.accumulate import FullGradient
from megatron_lion.optim.nonfinite import describe_damage, gather_damage, local_damage, nonfinite_gradients
from megatron_lion.parallel import broadcast_object
from megatron_lion.runs.metrics import MetricsWriter
from megatron_lion.runs.steps import list_steps
from megatron_lion.train.random_state import random_state_kept
from megatron_lion.train.run import Run, sync_parameters
from megatron_lion.train.step import TrainStep

logger = logging.getLogger(__name__)

# Dynamic loss scaling of fp16 overflows now and then by design; only a long series indicates a fault.
FP16_PATIENCE = 10
# The gate's norm is the root of a sum of squares in fp32: above this it is infinite although every element is finite.
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
LOWER_RATE = "Start again with a lower optimizer.lr (another run_dir, or --fresh)"


class LastBatch(Iterator[dict[str, torch.Tensor]]):
    """Passes micro-batches on and remembers the last one.

    Attributes:
        last: the last micro-batch.
    """

    last: dict[str, torch.Tensor]

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self._batches = batches

    def __next__(self) -> dict[str, torch.Tensor]:
        self.last = next(self._batches)
        return self.last


class Health:
    """Consecutive skipped steps of a run, and the checks before a save. All methods are collective calls.

    Args:
        run: the run.
        metrics: receives what was skipped and why.

    Attributes:
        skipped_in_a_row: consecutive skipped steps up to now.
    """

    def __init__(self, run: Run, metrics: MetricsWriter) -> None:
        self.run, self.metrics = run, metrics
        self.skipped_in_a_row = 0
        self._uncounted_in_a_row = 0
        self._zero_in_a_row = 0
        self._dead_in_a_row = self._dead_since = 0

    def judge(self, result: TrainStep) -> None:
        """Counts a step, and reports it if it was skipped or if its gradient was zero.

        Call it before the next step; the gradient buffers must still hold the step's gradient.

        Raises:
            NumericsError: the state is not finite, so no later step can be taken; or `optimizer.max_skipped_steps` steps in
                a row (ten times as many in fp16), or the run's last one, had a gradient that is not finite.
            DataError: the loss counted nothing in `max_skipped_steps` steps in a row, or in the run's last one.
        """
        if not result.skipped:
            self.skipped_in_a_row = self._uncounted_in_a_row = 0
            self._report_zero_gradient(result)
            return
        self.skipped_in_a_row += 1
        if result.uncounted is not None:
            self._uncounted_in_a_row += 1
            self._report_uncounted(result.uncounted)
        else:
            self._uncounted_in_a_row = 0
            self.require_finite_state()
            self._report_gradient()

    def require_finite_state(self) -> None:
        """Raises an error if a weight, master weight or optimizer state is not finite on any rank.

        Raises:
            NumericsError: names the tensor that is damaged itself, and the newest checkpoint.
        """
        damage = gather_damage(local_damage(self.run.model, self.run.optimizer))
        if damage:
            where = describe_damage(damage)
            self._give_up({"optim/nonfinite_state": where}, damaged_state(self.run, where))

    def may_save(self, batch: dict[str, torch.Tensor]) -> bool:
        """Whether the state may be saved now; if not, the save must wait for a later step.

        Args:
            batch: the last micro-batch of the step.

        Raises:
            NumericsError: the state is not finite; or it was dead after the run's last step, or each time that it was tried
                in the last `optimizer.max_skipped_steps` steps.
        """
        run = self.run
        if self.skipped_in_a_row and not self._at_the_end:
            logger.warning("step %d was skipped: its checkpoint is saved after the next step that is taken", run.step)
            return False
        self.require_finite_state()
        loss, norm = trial_gradient(run, batch)
        if math.isfinite(loss) and (self._scales_loss or norm < LARGEST_NORM):
            self._dead_in_a_row = 0
            return True
        self._dead_in_a_row += 1
        self._dead_since = self._dead_since if self._dead_in_a_row > 1 else run.step
        why = f"step {run.step}: after it, the gradient of its own samples is NaN or infinite, so the step was too large; not saved"
        logger.warning("%s", why)
        if self._dead_in_a_row >= run.config.optimizer.max_skipped_steps or self._at_the_end:
            message = f"{why}. {LOWER_RATE}. {newest_checkpoint(run)}"
            self._give_up({}, NumericsError(message))
        return False

    def _report_gradient(self) -> None:
        run = self.run
        names = nonfinite_gradients(run.model)
        found: list[list[str]] = [[] for _ in range(run.ranks.world_size)]
        dist.all_gather_object(found, names)
        ranks = [rank for rank, items in enumerate(found) if items]
        logger.warning("step %d skipped: gradients not finite on this rank in %s", run.step, names or "none")
        # The reduction has already spread the value to other ranks; the rank that produced it is one of those listed.
        where = (
            f"first in {found[ranks[0]][0]}, seen on ranks {ranks}" if ranks else "in the reduced gradient or its norm"
        )
        values: dict[str, str | int] = {
            "optim/skipped_steps": run.optimizer.num_skipped,
            "optim/nonfinite_gradient": where,
        }
        limit = run.config.optimizer.max_skipped_steps * (FP16_PATIENCE if self._scales_loss else 1)
        if self.skipped_in_a_row >= limit or (self._at_the_end and not self._may_end_skipped):
            cause = (
                f"step {self._dead_since} was too large: after it, even the gradient of its own samples was not finite. {LOWER_RATE}"
                if self._dead_in_a_row
                else f"{LOWER_RATE}, or check the data of these steps"
            )
            message = (
                f"step {run.step}: gradients were NaN or infinite {times(self.skipped_in_a_row)} ({where}); weights and "
                f"optimizer state are finite, and these steps changed nothing. {cause}. {newest_checkpoint(run)}"
            )
            self._give_up(values, NumericsError(message))
        self.metrics.write(run.step, values)

    def _report_uncounted(self, name: str) -> None:
        run = self.run
        logger.warning("step %d skipped: the loss counts nothing (%s is 0)", run.step, name)
        values: dict[str, str | int] = {"optim/skipped_steps": run.optimizer.num_skipped, "optim/uncounted": name}
        if self._uncounted_in_a_row >= run.config.optimizer.max_skipped_steps or self._at_the_end:
            message = (
                f"step {run.step}: the loss counted nothing ({name} is 0 over the global batch) "
                f"{times(self._uncounted_in_a_row)}; these steps changed nothing. Check the samples of data.path and the "
                f"index cache (data.cache, or the run's folder cache). {newest_checkpoint(run)}"
            )
            self._give_up(values, DataError(message))
        self.metrics.write(run.step, values)

    def _report_zero_gradient(self, result: TrainStep) -> None:
        zero = result.grad_l2 == 0.0
        self._zero_in_a_row = self._zero_in_a_row + 1 if zero else 0
        if self._zero_in_a_row == 1:
            text = f"step {self.run.step}: the gradient is exactly zero (loss {result.loss:g}), so weights move by old momentum only"
            logger.warning("%s; check the data, and in fp16 the loss scale", text)
            self.metrics.write(self.run.step, {"optim/zero_gradient": 1})

    @property
    def _scales_loss(self) -> bool:
        return self.run.config.train.precision == "fp16"

    @property
    def _at_the_end(self) -> bool:
        return self.run.step >= self.run.config.train.steps

    @property
    def _may_end_skipped(self) -> bool:
        # An overflow of the scaled loss says nothing about the state, if any step was taken at all.
        return self._scales_loss and self.run.optimizer.num_steps > 0

    def _give_up(self, values: dict[str, str | int], error: MegatronLionError) -> None:
        # By this line readers of the folder know that the run has ended, and whether it diverged: `RunRecord.diverged`.
        self.metrics.write(self.run.step, {**values, "optim/gave_up": int(isinstance(error, NumericsError))})
        error.told_by = 0  # all ranks raise it alike
        raise error


def trial_gradient(run: Run, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Returns loss and gradient norm of one micro-batch at the present weights; a collective call.

    Nothing of the run changes: the gradient buffers are zero afterwards, dropout is off.

    Args:
        run: the run, between two steps.
        batch: this rank's micro-batch.
    """
    sync_parameters(run.model)
    with random_state_kept(), FullGradient(
        run.model, run.optimizer, run.forward_step, run.ranks, num_microbatches=1,
        micro_batch_size=run.config.micro_batch_size, seq_length=run.config.model.seq_length,
        vocab_size=run.corpora.vocab_size,
    ) as full:  # fmt: skip
        full.add(iter([batch]))
        return full.loss, full.read().norms().grad_l2


def damaged_state(run: Run, where: str) -> NumericsError:
    """Returns the error of a run whose state is not finite; a collective call.

    Args:
        run: the run.
        where: from `describe_damage`.
    """
    return NumericsError(
        f"step {run.step}: the training state is damaged: {where}. It was not saved. Either a step was too large (start again "
        "with a lower optimizer.lr, in another run_dir or with --fresh) or the memory of this machine is faulty (run "
        f"the same command, elsewhere if it happens again). {newest_checkpoint(run)}"
    )


def times(count: int) -> str:
    """Returns how often in a row, in words.

    >>> times(1), times(3)
    ('in 1 step', '3 times in a row')
    """
    return f"{count} times in a row" if count > 1 else "in 1 step"


def newest_checkpoint(run: Run) -> str:
    """Returns a sentence about the step at which the same command continues; a collective call."""
    steps = broadcast_object(list_steps(run.run_dir) if run.ranks.is_main else None)
    if not steps:
        return "There is no checkpoint: the same command starts at step 0"
    if steps[-1] == 0:
        return "The newest checkpoint is that of the imported weights: the same command starts from them"
    return f"The newest checkpoint is that of step {steps[-1]}: the same command resumes there"
