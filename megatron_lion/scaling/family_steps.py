"""The subcommands of a family in order: text, vocabulary, tokens, trainings, longer probes; finished ones are not started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lion.errors import ConfigError
from megatron_lion.jobs import Jobs, typed_path
from megatron_lion.reproduce.artefacts import Plan, Step, data_folder, data_steps
from megatron_lion.reproduce.recipes import list_of_one
from megatron_lion.reproduce.run_verbs import run_plan
from megatron_lion.reproduce.sources import Sources, note_text
from megatron_lion.runs.folder import read_config
from megatron_lion.runs.paths import has_config
from megatron_lion.runs.probes import probe_file
from megatron_lion.runs.steps import is_committed
from megatron_lion.scaling.family import Family, FamilyRun
from megatron_lion.scaling.measure import missing_probes
from megatron_lion.shipped import shipped_folder

CONFIGS = {"tiny": "demo.yaml", "full": "gpt2_small.yaml"}
"""Config of the settings that a family shares, by scale."""


def config_path(family: Family) -> Path:
    """The config of the settings that the family's models share."""
    return shipped_folder("configs") / CONFIGS[family.scale]


def run_folder(run: FamilyRun, output: Path) -> Path:
    """The run folder of a run."""
    return output / "runs" / run.name


def training(family: Family, run: FamilyRun, sources: Sources) -> Step:
    """The step that trains a run, with the first probe of each step."""
    is_launched = family.scale == "full"
    folder = run_folder(run, sources.output)
    words = ["--config", typed_path(config_path(family)), "--run_dir", str(folder),
             "--data.path", list_of_one(data_folder("gpt2", sources.output)),
             *run.recipe.words(), *family.pretrain_words(run)]  # fmt: skip
    if not is_launched:
        words += ["--data.cache", str(sources.output / "cache")]
    return Step(run.title, "pretrain", tuple(words), spread=True, launched=is_launched)


def probing(run: FamilyRun, output: Path, steps: list[int], batches: int | str) -> Step:
    """The step that probes checkpoints of a run over a number of batches, or all."""
    listed = ",".join(map(str, steps))
    words = (str(run_folder(run, output)), "--steps", listed, "--num-batches", str(batches))
    return Step(f"{run.name}: {batches} batches at step {listed}", "probe", words, spread=True)


def check_folders(family: Family, output: Path) -> None:
    """Checks that runs which exist have the settings that this family gives them.

    Raises:
        ConfigError: one has not; the message names it.
        CheckpointError, DataError: the settings of a run cannot be read.
    """
    for run in family.runs():
        folder = run_folder(run, output)
        if not has_config(folder):
            continue
        config = read_config(folder)
        model = family.model(run.shape, config.model)
        planned = {
            "optimizer.lr": (config.optimizer.lr, run.recipe.lr),
            "optimizer.weight_decay": (config.optimizer.weight_decay, run.recipe.weight_decay),
            "train.steps": (config.train.steps, family.steps),
            "model.num_attention_heads": (config.model.num_attention_heads, model.num_attention_heads),
        }
        if changed := [f"{key} {old:g}, now {new:g}" for key, (old, new) in planned.items() if old != new]:
            raise ConfigError(
                f"--output {output}: {run.name} was trained with {', '.join(changed)}; choose another folder"
            )


def is_trained(family: Family, run: FamilyRun, output: Path) -> bool:
    """Whether a run has its last checkpoint and the first probe of each measured step."""
    folder = run_folder(run, output)
    return is_committed(folder, family.steps) and all(probe_file(folder, step).is_file() for step in family.measure_at)


def missing_steps(family: Family, run: FamilyRun, output: Path) -> Iterator[Step]:
    """The steps that a run still needs; each is yielded once the one before it has ended.

    A longer probe may show that its noise share is still too large, and another follows, with at least 1.5 times its
    batches.
    """
    folder = run_folder(run, output)
    while missing := missing_probes(folder, family.measure_at, family.noise_share, family.max_batches):
        batches, steps = next(iter(missing.items()))
        yield probing(run, output, steps, batches)


def run_family(family: Family, sources: Sources, jobs: Jobs) -> None:
    """Makes what is missing of a family: data, trained runs, probes at the noise share.

    Args:
        family: the family.
        sources: text, tokenizer and output folder.
        jobs: runs the subcommands and forwards signals to them.

    Raises:
        StoppedOnRequest: a signal arrived; the same command continues there.
        ConfigError: the output folder has runs of other text or settings.
        MegatronLionError: a subcommand failed; it has its exit code.
    """
    data, runs = data_steps("gpt2", sources), family.runs()
    check_folders(family, sources.output)
    total = len(data) + 2 * len(runs)

    def make(step: Step, number: int) -> None:
        run_plan(Plan("scaling", family.scale, "gpt2", (step,)), sources.processes, jobs, first=number, total=total)

    for number, step in enumerate(data, 1):
        if step.verb in ("tokenizer", "prepare"):
            note_text(sources)
        make(step, number)
    for place, run in enumerate(runs):
        number = len(data) + 2 * place + 1
        if not is_trained(family, run, sources.output):
            make(training(family, run, sources), number)
            if not is_trained(family, run, sources.output):
                raise ConfigError(
                    f"--measure-at: {run_folder(run, sources.output)} was trained without probes and checkpoints at all of "
                    f"{', '.join(map(str, family.measure_at))}; give its steps, or another --output"
                )
        for step in missing_steps(family, run, sources.output):
            make(step, number + 1)


def all_steps(family: Family, sources: Sources) -> list[Step]:
    """The steps that are known before anything was measured, for --print.

    At the full scale they include one probe of the most batches at the measured checkpoints.
    """
    steps = data_steps("gpt2", sources)
    for run in family.runs():
        steps.append(training(family, run, sources))
        if family.scale == "full":
            saved = [step for step in family.measure_at if step > 0]
            steps += [probing(run, sources.output, saved, family.max_batches)] if saved else []
    return steps
