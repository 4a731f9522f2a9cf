"""Reads a run folder (settings, metrics, evaluations) into a `RunRecord`, without torch or the model."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, repeat
from operator import mul, sub, truediv
from pathlib import Path
from statistics import fmean, median
from types import UnionType
from typing import Any

import yaml

from megatron_lion.errors import CheckpointError
from megatron_lion.files import read_own
from megatron_lion.plain_text import plain, plain_tree
from megatron_lion.runs.folder import flatten
from megatron_lion.runs.paths import config_file, environment_file, evaluations_folder, facts_file, metrics_file
from megatron_lion.runs.sealed_json import read_sealed
from megatron_lion.runs.series import Series, SharedSteps, read_metrics

LAST_LINES = 10
"""Number of logged values in the mean that is a run's final training loss."""
REFERENCE = "reference"
"""Value of `RunRecord.optimizer` for a model that was evaluated but not trained here."""
OPTIMIZER_NAMES = {"lion": "LION", "sgd": "SGD", "adamw": "AdamW"}

Kind = tuple[type | UnionType, str]
_TEXT: Kind = (str, "a text")
_WHOLE: Kind = (int, "a whole number")
_NUMBER: Kind = (int | float, "a number")
# The types of what compare, theory and sweep compute with or look up; a changed file must not become a traceback there.
FACTS = {
    **dict.fromkeys(("name", "model", "optimizer", "data_digest", "tokenizer_sha256", "precision", "device"), _TEXT),
    **dict.fromkeys(("format", "seed", "vocab_size", "seq_length", "tokens_per_step", "world_size"), _WHOLE),
}
SETTINGS = {
    **dict.fromkeys(("name", "model.kind", "optimizer.name"), _TEXT),
    **dict.fromkeys(("seed", "train.steps", "train.stop_after", "train.test_every", "train.global_batch_size",
                     "model.seq_length", "optimizer.max_skipped_steps"), _WHOLE),
    **dict.fromkeys(("optimizer.lr", "optimizer.weight_decay"), _NUMBER),
}  # fmt: skip
RESULTS = {
    **dict.fromkeys(("kind", "text_path", "text_sha256", "text_version", "precision", "tokenizer_sha256", "state_sha256"), _TEXT),
    **dict.fromkeys(("format", "step", "stride", "seq_length", "max_tokens", "n_orig", "n_tok", "num_targets", "n_pages",
                     "n_words", "n_bytes", "n_passages", "start_id", "documents"), _WHOLE),
    **dict.fromkeys(("loss", "token_ppl", "log_token_ppl", "adjusted_ppl", "log_adjusted_ppl", "word_ppl", "log_word_ppl",
                     "byte_ppl", "bits_per_byte", "accuracy", "last_token_ppl", "log_last_token_ppl", "last_token_accuracy",
                     "seconds"), _NUMBER),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of one run folder.

    Attributes:
        folder: path of the run folder.
        model: name of the model, equal for runs that may be drawn together.
        optimizer: "lion", "sgd" or "adamw".
        num_parameters: d, with the padded vocabulary; None if the run does not state it.
        facts: run.json.
        settings: config.yaml as dotted keys.
        environment: environment.json.
        metrics: the numbers of metrics.jsonl.
        evaluations: eval/*.json, ascending by step.
        label: the run's name in tables and figures; unique within a model after `compare.selection.read_runs`.
        setting: the name of its setting, equal for runs that differ only in their seed; unique like `label`.
    """

    folder: Path
    model: str
    optimizer: str
    num_parameters: int | None
    facts: dict[str, Any] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    environment: dict[str, Any] = field(repr=False)
    metrics: dict[str, Series] = field(repr=False)
    evaluations: list[dict[str, Any]] = field(repr=False)
    label: str = ""
    setting: str = ""

    def series(self, key: str) -> Series:
        """Returns a metric; empty if the run does not have it."""
        return self.metrics.get(key, Series())

    def need(self, key: str) -> Series:
        """Returns a metric that the caller requires.

        Raises:
            CheckpointError: the run has no number under that key; the message names the command that writes it.
        """
        if key not in self.metrics:
            raise CheckpointError(
                f"{self.folder}: metrics.jsonl has no '{key}'"
                + (
                    f"; train with --probe.every, or run `megatron-lion probe {self.folder}`"
                    if key.startswith("probe/")
                    else ""
                )
            )
        return self.metrics[key]

    @property
    def is_reference(self) -> bool:
        """Whether this is a model that was evaluated but not trained here: an import, or a Hugging Face folder."""
        return self.optimizer == REFERENCE

    @property
    def dimension(self) -> int:
        """d, for callers that require it.

        Raises:
            CheckpointError: the run does not state it.
        """
        if self.num_parameters is None:
            raise CheckpointError(
                f"{self.folder}: neither run.json nor a probe has num_parameters; train with --probe.every, or run "
                f"`megatron-lion probe {self.folder}`"
            )
        return self.num_parameters

    @property
    def last_step(self) -> int:
        """The last step that any metric was written for."""
        return max((series.steps[-1] for series in self.metrics.values()), default=0)

    @property
    def seed(self) -> int | None:
        """The run's seed, or None if config.yaml does not state it."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def tokens_per_step(self) -> int | None:
        """Training tokens per step, or None if neither metrics nor settings give them."""
        tokens = self.series("progress/consumed_tokens")
        if tokens and tokens.steps[-1] > 0:
            return round(tokens.values[-1] / tokens.steps[-1])
        batch, length = self.settings.get("train.global_batch_size"), self.settings.get("model.seq_length")
        return batch * length if isinstance(batch, int) and isinstance(length, int) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median of the logged training throughput (tokens per second)."""
        values = self.series("perf/tokens_per_s").values
        return median(values) if values else None

    @property
    def max_memory_gib(self) -> float | None:
        """Largest logged memory use of the first process (GiB)."""
        return max(self.series("memory/max_gib").values, default=None)

    @property
    def end_train_loss(self) -> float | None:
        """Mean of the last ten logged training losses (nats per token); the loss of a single batch varies too much."""
        values = self.series("train/loss").values[-LAST_LINES:]
        return fmean(values) if values else None

    @property
    def scheduled_steps(self) -> int | None:
        """Steps of the whole schedule, or None if config.yaml does not state them."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def planned_steps(self) -> int | None:
        """The step after which the run is finished, or None if config.yaml does not state it."""
        steps, stop = self.scheduled_steps, self.settings.get("train.stop_after")
        return min(steps, stop or steps) if steps is not None else None

    @property
    def last_logged(self) -> int:
        """The last step with a log line; the extra line that reports a skipped step does not count."""
        progress = self.series("progress/consumed_tokens")
        return progress.steps[-1] if progress else self.last_step

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return self.last_logged >= (self.planned_steps or 0)

    @property
    def diverged(self) -> bool:
        """Whether the run ended because its gradients stayed NaN or infinite, or its state became so."""
        skipped, limit = self.series("optim/skipped_steps"), self.settings.get("optimizer.max_skipped_steps", 1)
        gave_up = self.series("optim/gave_up")
        if self.finished:
            return False
        if gave_up and gave_up.steps[-1] > self.last_logged:
            return gave_up.values[-1] == 1
        return bool(skipped) and skipped.values[-1] >= limit and skipped.steps[-1] > self.last_logged

    @property
    def last_due(self) -> int:
        """The step of the last held-out measurement that the settings ask for; 0 if they do not determine it."""
        planned, every = self.planned_steps or 0, self.settings.get("train.test_every") or 0
        if planned == self.scheduled_steps:
            return planned
        # The end of the schedule is always measured, the step of train.stop_after only if the interval divides it.
        return planned - planned % every if every > 0 else 0

    def final(self, key: str) -> tuple[int, float] | None:
        """Returns step and value of a held-out loss at its last due measurement.

        None if the run is unfinished or the loss was not finite there: an earlier value would compare other steps.
        """
        if not self.finished:
            return None
        series, end = self.series(key), self.last_step if self.planned_steps is None else self.planned_steps
        due = max(self.last_due, 1)  # the loss before training is not a final one
        found = [pair for pair in zip(series.steps, series.values, strict=True) if due <= pair[0] <= end]
        return found[-1] if found else None

    @property
    def valid_loss(self) -> float | None:
        """Validation loss at the end (nats per token); None if the run is unfinished or the loss was not finite."""
        final = self.final("valid/loss")
        return final[1] if final else None

    def training_seconds(self, step: int) -> float | None:
        """Seconds spent in training steps up to `step`, excluding measurements, saves and pauses between jobs."""
        seconds = self.seconds_at([step])
        return seconds[0] if seconds else None

    def seconds_at(self, steps: Sequence[int]) -> list[float] | None:
        """Returns `training_seconds` of several steps, or None if the run has no logged throughput."""
        per_step, (rate, spent) = self.tokens_per_step, self._times
        if not rate or per_step is None:
            return None
        ends, rates = rate.steps, rate.values
        if steps == ends:
            return list(spent)
        found, last = [], len(ends) - 1
        for step in steps:
            place = bisect_left(ends, step, 0, last)  # of the log line that covers the step, or of the last line
            found.append(spent[place] + (step - ends[place]) * per_step / rates[place] if step > 0 else 0.0)
        return found

    @cached_property
    def _times(self) -> tuple[Series, Sequence[float]]:
        """The logged throughput if positive (tokens per second), and the training seconds up to each of its steps."""
        rate, per_step = self.series("perf/tokens_per_s"), self.tokens_per_step or 0
        if min(rate.values, default=1.0) <= 0:
            kept = [pair for pair in zip(rate.steps, rate.values, strict=True) if pair[1] > 0]
            rate = Series(tuple(step for step, _ in kept), [value for _, value in kept])
        tokens = map(mul, map(sub, rate.steps, (0, *rate.steps)), repeat(per_step))
        return rate, array("d", accumulate(map(truediv, tokens, rate.values)))


def read_run(folder: str | Path, shared: SharedSteps | None = None) -> RunRecord:
    """Reads a run folder, or the evaluation results of a model that was not trained here.

    Args:
        folder: the folder.
        shared: steps of other runs, see `read_metrics`.

    Raises:
        CheckpointError: the folder is not a run folder, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; give the run_dir of a `megatron-lion pretrain`")
    if not metrics_file(folder).is_file() and (reference := _reference(folder)) is not None:
        return reference
    if not any(path.is_file() for path in (config_file(folder), facts_file(folder), metrics_file(folder))):
        raise CheckpointError(
            f"{folder}: not a run folder (no config.yaml, run.json or metrics.jsonl); "
            "give the run_dir of a `megatron-lion pretrain`"
        )
    facts, settings = _object(facts_file(folder)), flatten(_settings(config_file(folder)))
    _check_kinds(facts_file(folder), facts, FACTS)
    _check_kinds(config_file(folder), settings, SETTINGS)
    optimizer = str(facts.get("optimizer") or settings.get("optimizer.name") or "unknown")
    metrics = read_metrics(metrics_file(folder), shared)
    name = facts.get("name") or settings.get("name") or facts.get("model") or settings.get("model.kind")
    return RunRecord(
        folder=folder,
        model=str(name or "model"),
        optimizer=optimizer,
        num_parameters=_dimension(facts.get("num_parameters"), metrics.get("probe/num_parameters", Series()).last),
        facts=facts,
        settings=settings,
        environment=_object(environment_file(folder)),
        metrics=metrics,
        evaluations=_evaluations(evaluations_folder(folder)),
        label=OPTIMIZER_NAMES.get(optimizer, optimizer),
    )


def _reference(folder: Path) -> RunRecord | None:
    """Returns the record of an imported run without training, or of a Hugging Face folder; None if it is neither.

    Raises:
        CheckpointError: a Hugging Face folder has no results, or its model is no GPT-2.
    """
    evaluations = _evaluations(evaluations_folder(folder))
    if config_file(folder).is_file():
        if not evaluations or any(result["step"] != 0 for result in evaluations):
            return None  # a run that lost its metrics or never started
    elif not (folder / "config.json").is_file() or facts_file(folder).is_file():
        return None
    elif (kind := _model_type(folder / "config.json")) not in (None, "gpt2"):
        raise CheckpointError(
            f"{folder}: a Hugging Face model of type {kind}; a reference needs results of `megatron-lion evaluate`, which measures gpt2 "
            "folders only; remove it from the command"
        )
    elif not evaluations:
        raise CheckpointError(
            f"{folder}: a Hugging Face model without results; first measure it, for example: megatron-lion evaluate {folder} "
            "--wikitext103 FILE"
        )
    name = plain(folder.resolve().name)
    return RunRecord(
        folder=folder, model=name, optimizer=REFERENCE, num_parameters=None, facts={}, settings={}, environment={}, metrics={},
        evaluations=evaluations, label=REFERENCE,
    )  # fmt: skip


def _model_type(path: Path) -> str | None:
    """Returns the model_type of a Hugging Face folder's config.json, or None; transformers loads a GPT-2 without it too."""
    try:
        content = json.loads(read_own(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {plain((str(error).splitlines() or [''])[0])}") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    return plain(kind) if isinstance(kind, str) else None


def _dimension(*stated: Any) -> int | None:
    """Returns the first of several values for d that is a number of at least 1, or None."""
    for value in stated:
        if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf:
            return int(value)
    return None


def _object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        return read_sealed(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _settings(path: Path) -> dict[str, Any]:
    """Reads config.yaml; {} if it does not exist."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read: {plain((str(error).splitlines() or [''])[0])}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must contain an object, got {type(content).__name__}")
    found: dict[str, Any] = plain_tree({str(key): value for key, value in content.items()})
    return found


def _check_kinds(path: Path, content: dict[str, Any], kinds: dict[str, Kind]) -> None:
    """Refuses values of another type than the table gives; null and keys that are not in the table are accepted."""
    groups = {key.rpartition(".")[0]: value for key, value in content.items() if "." in key}
    for key, (type_of, name) in kinds.items():
        value = {"…": groups[key]} if key in groups else content.get(key)
        if value is not None and (not isinstance(value, type_of) or isinstance(value, bool)):
            raise CheckpointError(f"{path}: {key} must be {name}, got {plain(repr(value)[:80])}")


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Reads the evaluation results, ascending by step."""
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("."):
            continue
        result = _object(path)
        if not isinstance(result.get("step"), int) or "kind" not in result:
            raise CheckpointError(f"{path}: not an evaluation result (needs 'kind' and 'step')")
        _check_kinds(path, result, RESULTS)
        results.append(result)
    return sorted(results, key=lambda r: int(r["step"]))
