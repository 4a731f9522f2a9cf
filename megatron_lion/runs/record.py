"""Reads run folders: settings, metrics and evaluations, without torch and without the model."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.folder import flatten
from megatron_lion.runs.paths import config_file, environment_file, evaluations_folder, facts_file, metrics_file
from megatron_lion.runs.series import Series, read_metrics

# Settings that say where a run lies or how it is watched, not what it computes.
UNINTERESTING = ("run_dir", "name", "log.", "data.cache", "data.num_workers", "checkpoint.", "train.log_every",
                 "train.test_every", "train.stop_after", "probe.")  # fmt: skip
LAST_LINES = 10
"""The training loss of a run's end is the mean over this many logged values."""
OPTIMIZER_NAMES = {"lion": "LION", "sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run folder, read.

    Attributes:
        folder: where it lies.
        model: name of the model, the same for runs that may be drawn together.
        optimizer: "lion", "sgd" or "adamw".
        num_parameters: d, with the padded vocabulary; None where the run does not say.
        facts: run.json.
        settings: config.yaml as dotted keys.
        environment: environment.json.
        metrics: the numbers of metrics.jsonl.
        evaluations: eval/*.json, ascending by step.
        label: how tables and figures call it; unique within a model after `read_runs`.
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

    def series(self, key: str) -> Series:
        """A metric, empty where the run has none."""
        return self.metrics.get(key, Series())

    def need(self, key: str) -> Series:
        """A metric that the caller cannot do without.

        Raises:
            CheckpointError: the run has no number of that key; says what writes it.
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
    def dimension(self) -> int:
        """d, for callers that cannot do without it.

        Raises:
            CheckpointError: the run does not state it.
        """
        if self.num_parameters is None:
            raise CheckpointError(
                f"{self.folder}: neither run.json nor a probe says num_parameters; train with --probe.every, or run "
                f"`megatron-lion probe {self.folder}`"
            )
        return self.num_parameters

    @property
    def last_step(self) -> int:
        """The last step anything was written for."""
        return max((series.steps[-1] for series in self.metrics.values()), default=0)

    @property
    def seed(self) -> int | None:
        """The run's seed, where config.yaml tells it."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def tokens_per_step(self) -> int | None:
        """Training tokens of one step."""
        tokens = self.series("progress/consumed_tokens")
        if tokens and tokens.steps[-1] > 0:
            return round(tokens.values[-1] / tokens.steps[-1])
        batch, length = self.settings.get("train.global_batch_size"), self.settings.get("model.seq_length")
        return batch * length if isinstance(batch, int) and isinstance(length, int) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median training throughput over the whole job."""
        values = self.series("perf/tokens_per_s").values
        return median(values) if values else None

    @property
    def max_memory_gib(self) -> float | None:
        """Largest memory seen on the first process."""
        return max(self.series("memory/max_gib").values, default=None)

    @property
    def end_train_loss(self) -> float | None:
        """Mean of the last ten logged training losses: single batches scatter."""
        values = self.series("train/loss").values[-LAST_LINES:]
        return fmean(values) if values else None

    @property
    def scheduled_steps(self) -> int | None:
        """Steps of the whole schedule, if config.yaml states them."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def planned_steps(self) -> int | None:
        """The step after which the run is finished, if config.yaml states it."""
        steps, stop = self.scheduled_steps, self.settings.get("train.stop_after")
        return min(steps, stop or steps) if steps is not None else None

    @property
    def last_logged(self) -> int:
        """The last step that was taken and logged; a line that reports a skipped step is none."""
        progress = self.series("progress/consumed_tokens")
        return progress.steps[-1] if progress else self.last_step

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return self.last_logged >= (self.planned_steps or 0)

    @property
    def diverged(self) -> bool:
        """Whether the run gave up because its gradients stayed NaN or infinite."""
        skipped, limit = self.series("optim/skipped_steps"), self.settings.get("optimizer.max_skipped_steps", 1)
        return (
            not self.finished and bool(skipped) and skipped.values[-1] >= limit and skipped.steps[-1] > self.last_logged
        )

    @property
    def valid_loss(self) -> float | None:
        """Validation loss at the run's end (nats per token); None where it is not finished or was not finite there."""
        series = self.series("valid/loss")
        due = self.planned_steps == self.settings.get("train.steps")  # a run stopped before measures it earlier
        if not self.finished or not series or (due and series.steps[-1] < (self.planned_steps or 0)):
            return None
        return series.last

    def training_seconds(self, step: int) -> float | None:
        """Seconds spent in training steps up to `step`: measurements, saves and pauses between jobs left out."""
        seconds = self.seconds_at([step])
        return seconds[0] if seconds else None

    def seconds_at(self, steps: Sequence[int]) -> list[float] | None:
        """`training_seconds` of several steps; None where the run has no throughput."""
        rate, per_step = self.series("perf/tokens_per_s"), self.tokens_per_step
        logged = [(at, value) for at, value in zip(rate.steps, rate.values, strict=True) if value > 0]
        if not logged or per_step is None:
            return None
        ends, spent = [0], [0.0]
        for at, value in logged:
            spent.append(spent[-1] + max(0, at - ends[-1]) * per_step / value)
            ends.append(at)

        def seconds(step: int) -> float:
            place = min(bisect_left(ends, step), len(logged))  # the log line that step belongs to, at the end the last
            if place == 0:
                return 0.0
            return spent[place] + (step - ends[place]) * per_step / logged[place - 1][1]

        return [seconds(step) for step in steps]

    def group_key(self) -> tuple[str, ...]:
        """Equal for runs that differ in their seed alone."""
        relevant = {k: v for k, v in self.settings.items() if k != "seed" and not k.startswith(UNINTERESTING)}
        return (self.model, self.optimizer, json.dumps(relevant, sort_keys=True, default=str))


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        CheckpointError: it is no run folder, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; give the run_dir of a `megatron-lion pretrain`")
    if not any(path.is_file() for path in (config_file(folder), facts_file(folder), metrics_file(folder))):
        raise CheckpointError(
            f"{folder}: no run folder (no config.yaml, run.json or metrics.jsonl); "
            "give the run_dir of a `megatron-lion pretrain`"
        )
    facts, settings = _mapping(facts_file(folder)), flatten(_mapping(config_file(folder)))
    optimizer = str(facts.get("optimizer") or settings.get("optimizer.name") or "unknown")
    metrics = read_metrics(metrics_file(folder))
    name = facts.get("name") or settings.get("name") or facts.get("model") or settings.get("model.kind")
    return RunRecord(
        folder=folder,
        model=str(name or "model"),
        optimizer=optimizer,
        num_parameters=_dimension(facts.get("num_parameters"), metrics.get("probe/num_parameters", Series()).last),
        facts=facts,
        settings=settings,
        environment=_mapping(environment_file(folder)),
        metrics=metrics,
        evaluations=_evaluations(evaluations_folder(folder)),
        label=OPTIMIZER_NAMES.get(optimizer, optimizer),
    )


def _dimension(*stated: Any) -> int | None:
    """The first of several statements of d that is a number of at least 1."""
    for value in stated:
        if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf:
            return int(value)
    return None


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML object; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read: {(str(error).splitlines() or [''])[0]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: should hold an object, holds a {type(content).__name__}")
    return content


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluation results, ascending by step."""
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("."):
            continue
        result = _mapping(path)
        if not isinstance(result.get("step"), int) or "kind" not in result:
            raise CheckpointError(f"{path}: no evaluation result (needs 'kind' and 'step')")
        results.append(result)
    return sorted(results, key=lambda r: int(r["step"]))


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Reads several run folders and gives each a label of its own.

    Raises:
        ConfigError: no folder, or one folder twice.
        CheckpointError: a folder is no run, or the runs have nothing in common.
    """
    if not folders:
        raise ConfigError("no run folder given; type: megatron-lion compare RUN RUN …")
    places = [Path(folder).resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: the same run is given twice")
    runs = [read_run(folder) for folder in folders]
    _need_common_ground(runs)
    return with_labels(runs)


def loss_unit(runs: Iterable[RunRecord]) -> str:
    """What a loss is counted in: GPT-2's is a mean over tokens, BERT's the sum of a mean over masked tokens and one over samples."""
    are_bert = {bool(run.series("train/mlm_loss") or run.series("test/mlm_loss")) for run in runs}
    if are_bert == {True}:
        return "nats, masked tokens + order"
    return "nats" if True in are_bert else "nats per token"


def evaluation_key(result: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for results of the same text under the same convention."""
    keys = ("kind", "text_sha256", "stride", "seq_length", "precision", "max_tokens")
    return tuple(result.get(key) for key in keys)


def evaluation_keys(runs: Sequence[RunRecord]) -> list[tuple[Any, ...]]:
    """The texts and conventions by which runs have token perplexities: WikiText-103 first, whole texts, short strides."""
    found = {
        evaluation_key(r): (r["kind"] != "wikitext103", r.get("max_tokens") is not None, r.get("stride") or 0)
        for run in runs
        for r in run.evaluations
        if r.get("log_token_ppl") is not None
    }
    return sorted(found, key=lambda key: found[key])


def main_evaluation_key(runs: Sequence[RunRecord]) -> tuple[Any, ...] | None:
    """The convention that most runs were evaluated by, the first of `evaluation_keys` among equals."""
    keys = evaluation_keys(runs)
    having = {key: sum(any(evaluation_key(r) == key for r in run.evaluations) for run in runs) for key in keys}
    return max(keys, key=lambda key: having[key]) if keys else None


def _need_common_ground(runs: list[RunRecord]) -> None:
    """Refuses runs of which no two share a model, a tokenizer or an evaluated text."""
    if len(runs) < 2:
        return
    seen: list[tuple[Any, ...]] = []
    for run in runs:
        marks: set[tuple[Any, ...]] = {("model", run.model), *map(evaluation_key, run.evaluations)}
        if tokenizer := run.facts.get("tokenizer_sha256"):
            marks.add(("tokenizer", tokenizer))
        seen += marks
    if len(seen) == len(set(seen)):
        names = ", ".join(f"{run.folder} ({run.model})" for run in runs)
        raise CheckpointError(
            f"the runs have nothing in common, neither model nor tokenizer nor an evaluated text: {names}"
        )


def with_labels(runs: list[RunRecord]) -> list[RunRecord]:
    """Labels runs by optimizer; where that is not enough, by the settings in which they differ, else by folder."""
    from dataclasses import replace

    labelled = []
    for run in runs:
        rivals = [r for r in runs if (r.model, r.optimizer) == (run.model, run.optimizer)]
        base = OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)
        label = base if len(rivals) == 1 else f"{base} {_distinction(run, rivals)}"
        labelled.append(replace(run, label=label))
    labels = [(run.model, run.label) for run in labelled]
    return [
        replace(run, label=f"{run.label} ({run.folder.name})") if labels.count((run.model, run.label)) > 1 else run
        for run in labelled
    ]


def _distinction(run: RunRecord, rivals: list[RunRecord]) -> str:
    """The settings that tell a run from its rivals, at most three, such as `lr=0.001 seed=2`."""
    different = [key for key in differing_settings(rivals) if key in run.settings]
    if not different or len(different) > 3:
        return run.folder.name
    return " ".join(f"{key.rpartition('.')[2]}={show(run.settings[key])}" for key in different)


def differing_settings(runs: Iterable[RunRecord]) -> list[str]:
    """Dotted keys whose values are not the same in all runs, where-it-lies settings left out."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [
        key
        for key in keys
        if not key.startswith(UNINTERESTING)
        and len({json.dumps(run.settings.get(key), sort_keys=True, default=str) for run in runs}) > 1
    ]


def by_model(runs: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each model, in the order given."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    return groups


def show(value: Any) -> str:
    """A setting as one would type it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(show, value)) + ")"
    return str(value)
