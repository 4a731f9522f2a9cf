"""`megatron-lion probe`: measures the full gradient of a run's checkpoints after training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.streams import load, next_steps, stderr_is_terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.compare.table import Cell, Table

HELP = (
    "Measure the full gradient of a run's checkpoints: norms, KKT residual, signal and noise. megatron-lion starts one process; for N "
    "processes use python -m megatron_lion.launcher --processes N probe …"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("run_dir", type=str, metavar="RUN", help="run folder")
    add("--steps", type=str, default="all", help="all, latest, or a list such as 10000,20000")
    add(
        "--num-batches",
        type=int | Literal["all"] | None,
        default=None,
        metavar="N",
        help="global batches to average over, or all: every sample once; default: the run's probe.num_batches",
    )
    add(
        "--data",
        type=Literal["fixed", "fresh", "test"] | None,
        default=None,
        help="samples: training samples, the same for every step (fixed) or new ones (fresh), or the test split (test); "
        "default: the run's probe.data",
    )
    add("--dropout", action="store_true", default=None, help="keep dropout active")
    add(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel size of this job; it may differ from the run's",
    )
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline-parallel size of this job")
    add(
        "--sequence-parallel",
        action="store_true",
        help="shard activations along the sequence; needs tensor parallelism",
    )
    add(
        "--micro-batch-size",
        type=int,
        default=None,
        metavar="N",
        help="samples in one pass on one process; default: the run's train.micro_batch_size",
    )
    add(
        "--device",
        type=str,
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto takes CUDA if a device is visible",
    )
    add(
        "--smoothness",
        type=int,
        default=None,
        metavar="N",
        help="instead of the gradient, measure its change along the run's next N steps from each checkpoint: smoothness in "
        "the max norm and in the Euclidean norm, and curvature",
    )
    add("--again", action="store_true", help="measure again steps that have a result")
    add(
        "--figures",
        action="store_true",
        help="draw RUN/figures/probe_*.png from all probe results of the run, or with --smoothness smoothness.png",
    )
    add(
        "--beside",
        type=str,
        nargs="+",
        default=[],
        metavar="RUN",
        help="with --figures: further runs of the same model size to draw in the same figures",
    )


def run(args: Any) -> None:
    """Writes RUN/probe/step_*.json and prints a table with one row for each step."""
    from pathlib import Path

    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.config import ParallelConfig
    from megatron_lion.errors import ConfigError
    from megatron_lion.jobs import rank_from_env
    from megatron_lion.runs.steps import choose_steps, list_steps
    from megatron_lion.signals import stop_raises

    load("megatron_lion.train.probe_checkpoints", shown=rank_from_env() == 0)
    from megatron_lion.train.probe_checkpoints import probe_checkpoints, probe_config

    run_dir, is_main = Path(args.run_dir), rank_from_env() == 0
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )
    if args.beside and not args.figures:
        raise ConfigError("--beside: needs --figures, in which it draws further runs")
    if args.smoothness is not None and args.dropout:
        raise ConfigError("--smoothness: the two gradients would have other dropout masks; leave out --dropout")
    dropout = False if args.smoothness is not None else args.dropout
    settings = {"num_batches": args.num_batches, "data": args.data, "dropout": dropout}
    config = probe_config(
        run_dir, probe=settings, parallel=parallel, micro_batch_size=args.micro_batch_size, device=args.device
    )
    steps = choose_steps(args.steps, list_steps(run_dir))
    if args.smoothness is not None:
        _smoothness(config, steps, args, is_main)
        return
    stopped = "stopped; finished steps are kept; the same command probes the others"
    with stop_raises(stopped), _Progress(shown=is_main) as progress:
        probed = list(probe_checkpoints(config, steps, again=args.again, on_batch=progress.update))
    if is_main:
        print_tables([probe_table(probed)])
        sys.stdout.write("".join(f"{item.path}{'' if item.is_new else '  (found)'}\n" for item in probed))
        if args.figures:
            from megatron_lion.gradient.probe_figures import draw_runs

            for path in draw_runs([run_dir, *args.beside]):
                sys.stdout.write(f"{path}\n")
        next_steps(["megatron-lion", "theory", str(run_dir)], ["megatron-lion", "compare", str(run_dir)])


def _smoothness(config: Any, steps: list[int], args: Any, is_main: bool) -> None:
    """Writes RUN/probe/smoothness_*.json and prints a table with one row for each step."""
    from pathlib import Path

    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.gradient.smoothness_table import smoothness_table
    from megatron_lion.runs.folder import read_config
    from megatron_lion.runs.probes import has_probes
    from megatron_lion.signals import stop_raises
    from megatron_lion.streams import say
    from megatron_lion.train.smoothness_checkpoints import choose_checkpoints, smoothness_checkpoints

    if args.steps in ("all", "latest"):
        steps, left_out = choose_checkpoints(config, steps, args.smoothness)
        for reason in left_out if is_main else ():
            say(f"left out: {reason}")
    stopped = "stopped; finished steps are kept; the same command measures the others"
    with stop_raises(stopped), _Progress(shown=is_main) as progress:
        measured = list(
            smoothness_checkpoints(config, steps, args.smoothness, again=args.again, on_batch=progress.update)
        )
    if is_main:
        own = read_config(Path(args.run_dir)).train.accumulate_allreduce_grads_in_fp32
        print_tables([smoothness_table([item.content for item in measured], has_bf16_gradients=not own)])
        sys.stdout.write("".join(f"{item.path}{'' if item.is_new else '  (found)'}\n" for item in measured))
        if args.figures:
            from megatron_lion.gradient.smoothness_figure import draw_smoothness

            sys.stdout.write(f"{draw_smoothness([args.run_dir, *args.beside], args.smoothness)}\n")
        if has_probes(args.run_dir):
            next_steps(["megatron-lion", "theory", str(args.run_dir)])


def probe_table(probed: list[Any]) -> Table:
    """Returns the results of probed steps as a table with one row a step."""
    from megatron_lion.compare.table import Table

    columns = ["step", "loss", "grad_l1", "grad_l2", "r", "± (se)", "r/√d", "r/√d ≥", "r/√d ≤", "r/√d noise",
               "KKT", "noise"]  # fmt: skip
    rows: list[list[Cell]] = []
    notes = []
    for item in probed:
        content, norms = item.content, item.content["all"]
        noise, root = content["noise"] or {}, norms["num_parameters"] ** 0.5
        error = content["ladder"][-1].get("norm_ratio_standard_error") if content["ladder"] else None
        bounds = [noise.get(f"norm_ratio_{name}") for name in ("low", "high", "noise")]
        rows.append([
            item.step, content["loss"], norms["grad_l1"], norms["grad_l2"], norms["norm_ratio"], error,
            norms["norm_ratio_over_sqrt_d"], *(None if bound is None else bound / root for bound in bounds),
            norms["kkt_residual"], noise.get("noise_share"),
        ])  # fmt: skip
    if any(item.content["all"]["kkt_residual"] is None for item in probed):
        notes.append("λ is 0 (weight_decay 0): there is no box constraint, and the KKT residual is undefined")
    if any(item.content["ladder"] for item in probed):
        notes.append(
            "±: standard error of r, – if there are too few groups of batches; r/√d ≥ and ≤: bounds of the noise-free "
            "gradient, up to their standard errors in the file, – if the signal is not resolved; r/√d noise: of the noise "
            "alone; noise: its share in ‖ḡ‖₂²"
        )
    formats = {
        "step": "d",
        "loss": ".4f",
        "grad_l1": ".5f",
        "grad_l2": ".5f",
        "r": ".2f",
        "± (se)": ".2f",
        "KKT": ".5f",
    }
    return Table(
        slug="probe", title="Full gradient", columns=columns, rows=rows, notes=notes, num_keys=1,
        formats=formats | dict.fromkeys(("r/√d", "r/√d ≥", "r/√d ≤", "r/√d noise"), ".4f") | {"noise": ".1%"},
    )  # fmt: skip


class _Progress:
    """A progress bar on stderr, if that is a terminal."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
            disable=not shown or not stderr_is_terminal(),
        )  # fmt: skip
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(f"step {step}", total=total)
        self._progress.update(self._tasks[step], completed=done)
