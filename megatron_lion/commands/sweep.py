"""`megatron-lion sweep`: runs a grid of settings and picks the best of each optimizer."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.configfile import add_run_config, run_config_from_namespace
from megatron_lion.streams import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_lion.config import RunConfig
    from megatron_lion.sweep.plan import PlannedRun
    from megatron_lion.sweep.sweep_file import Sweep

HELP = (
    "Train one run for each point of a grid of settings, such as optimizers and learning rates, and pick the best of each optimizer by "
    "validation loss. The same command continues unfinished runs; another grid adds runs. All settings of `pretrain` are flags here too"
)


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.takes_config_first = True
    parser.usage = "megatron-lion sweep CONFIG --grid KEY=VALUE,VALUE [--grid …] [options] [--SETTING VALUE …]"
    add = parser.add_argument
    add(
        "--grid",
        type=str,
        action="append",
        metavar="KEY=VALUE,VALUE",
        help="a setting and its values; several --grid are crossed. optimizer.lr=paper means the paper's eight rates; "
        "sgd:optimizer.lr=1,0.3,0.1 applies to the runs of sgd only",
    )
    add(
        "--output",
        type=str,
        default="runs/sweep",
        metavar="DIR",
        help="folder of the sweep, with one folder for each run",
    )
    add("--processes", type=int, default=1, help="processes that train a run together; with --slurm, GPUs of the node")
    add(
        "--dry-run",
        action="store_true",
        help="check every run, print the number of runs, tokens, memory and time, and exit",
    )
    add("--print", action="store_true", help="print a shell script of the unfinished runs; start none")
    add(
        "--slurm",
        action="store_true",
        help="write a SLURM array job of the unfinished runs to DIR/sweep.sbatch; start none",
    )
    add(
        "--confirm",
        type=int,
        default=0,
        metavar="N",
        help="once the grid is finished, train each optimizer's best setting on N fresh seeds (at least 2), which took no part in the "
        "choice; comparisons of the best then use these runs only",
    )
    add(
        "--retry-diverged",
        action="store_true",
        help="start diverged runs again, which ended with NaN or infinite gradients",
    )
    add(
        "--format",
        type=str,
        default="text",
        choices=["text", "markdown", "csv", "latex"],
        help="format of the printed table; DIR/table.md and table.csv are always written",
    )
    add_run_config(parser)


def run(args: Any) -> None:
    """Plans and checks the runs, runs or prints the unfinished ones, and prints the sweep's table to stdout."""
    from megatron_lion.runs.folder import locked
    from megatron_lion.sweep.execute import missing
    from megatron_lion.sweep.grid import parse_grids
    from megatron_lion.sweep.plan import plan_runs
    from megatron_lion.sweep.sweep_file import open_sweep, write_base

    _check_flags(args)
    folder, config_file = Path(args.output), str(args.config[-1])
    base: RunConfig = replace(run_config_from_namespace(args.parser, args), run_dir=args.output)
    planned = plan_runs(base, parse_grids(args.grid or []), folder, args.processes)
    sweep, runs = open_sweep(folder, config_file, base, args.grid, planned)
    if args.dry_run:
        sys.stdout.write(_describe(sweep, runs, args))
        return
    with locked(folder):
        # Read again under the lock, because another command may have added runs since.
        sweep, runs = open_sweep(folder, config_file, base, args.grid, planned)
        write_base(sweep, base, runs)
        sweep.save()
        left = missing(sweep, runs, again=args.retry_diverged)
        if args.print or args.slurm:
            _write_script(sweep, runs, left, args)
        else:
            _run_and_tell(sweep, runs, left, args)


def _check_flags(args: Any) -> None:
    from megatron_lion.errors import ConfigError

    if not args.config:
        raise ConfigError("no config file given; run: megatron-lion sweep CONFIG --grid optimizer.lr=1e-3,3e-4")
    if any(word == "--run_dir" or word.startswith("--run_dir=") for word in args.parser.words):
        raise ConfigError("--run_dir: a sweep chooses the folders of its runs; give --output DIR")
    if args.confirm < 0 or args.confirm == 1:
        raise ConfigError(
            f"--confirm {args.confirm}: must be at least 2, because one seed does not show the scatter of the seeds"
        )
    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: must be at least 1")
    if args.dry_run + args.print + args.slurm > 1:
        raise ConfigError("--dry-run, --print and --slurm exclude each other; give one of them")


def _describe(sweep: Sweep, runs: Sequence[PlannedRun], args: Any) -> str:
    """Returns the text of --dry-run: the first run as `pretrain --dry-run` shows it, all runs with their state, and sums."""
    from megatron_lion.sweep.confirm import plan_confirmation, unfinished_grid, waiting_text
    from megatron_lion.sweep.execute import missing
    from megatron_lion.train.dryrun import dry_run

    later = ""
    planned = list(runs)
    if args.confirm and unfinished_grid(sweep):
        optimizers = len({entry.settings["optimizer.name"] for entry in sweep.grid_runs})
        tokens = args.confirm * optimizers * runs[0].tokens
        later = (
            f"{waiting_text(sweep, runs)}\n"
            f"then at most {args.confirm} seeds × {optimizers} optimizer{'s' if optimizers != 1 else ''}: {tokens:,} tokens\n"
        )
    elif args.confirm:
        planned += plan_confirmation(sweep, args.confirm, args.processes)[0]
    status = {entry.name: entry.status for entry in sweep.runs}
    left = missing(sweep, planned, again=args.retry_diverged)
    lines = [f"  {run.name:40} {status[run.name]}" for run in planned]
    tokens = sum(run.tokens for run in left)
    return (
        f"{dry_run(runs[0].config, args.processes)}\n\n"
        f"Above: the first run. The sweep has {len(planned)} runs in {sweep.folder}, all with valid settings:\n"
        + "\n".join(lines)
        + f"\n{len(left)} to run, one after another: {tokens:,} tokens at most\n{later}"
    )


def _confirmation_left(sweep: Sweep, args: Any) -> list[PlannedRun]:
    """Plans and saves the confirmation of a sweep whose grid is finished; returns its unfinished runs."""
    from megatron_lion.sweep.confirm import plan_confirmation
    from megatron_lion.sweep.execute import missing

    runs, choices = plan_confirmation(sweep, args.confirm, args.processes)
    sweep.save()
    left = missing(sweep, runs, again=args.retry_diverged)
    if left:
        seeds = ", ".join(map(str, sweep.confirm_seeds))
        names = " and ".join(choice.name for choice in choices)
        say(f"\nconfirmation: the best setting of {names} on the seeds {seeds}, {len(left)} to run")
    return left


def _write_script(sweep: Sweep, runs: Sequence[PlannedRun], left: Sequence[PlannedRun], args: Any) -> None:
    from megatron_lion.files import write_whole
    from megatron_lion.sweep.confirm import unfinished_grid, waiting_text
    from megatron_lion.sweep.scripts import shell_script, slurm_script

    waiting = args.confirm and unfinished_grid(sweep)
    if waiting:
        say(waiting_text(sweep, runs))
    elif args.confirm:
        left = [*left, *_confirmation_left(sweep, args)]
    if not left and waiting:
        return
    if not left:
        say("nothing to do: every run is finished")
    elif args.print:
        sys.stdout.write(shell_script(sweep, left, args.processes))
    else:
        path = sweep.folder / "sweep.sbatch"
        write_whole(path, slurm_script(sweep, left, args.processes, path).encode())
        sys.stdout.write(f"sbatch {shlex.quote(str(path))}\n")
        say("after the job, the same command without --slurm runs what failed and prints the table")


def _run_and_tell(sweep: Sweep, runs: Sequence[PlannedRun], left: Sequence[PlannedRun], args: Any) -> None:
    """Runs unfinished runs and the confirmation, then prints the table, the line that compares the best, and the failures."""
    from megatron_lion.commands.compare import print_tables
    from megatron_lion.errors import NumericsError
    from megatron_lion.jobs import child_end, child_failure
    from megatron_lion.sweep.confirm import unfinished_grid, waiting_text
    from megatron_lion.sweep.execute import failed, run_missing, stopped
    from megatron_lion.sweep.summary import summarise

    asked = run_missing(sweep, left, args.processes)
    unfinished = unfinished_grid(sweep)
    if args.confirm and not unfinished:
        more = _confirmation_left(sweep, args)
        if asked and more:
            raise stopped(sweep, "before the confirmation")
        run_missing(sweep, more, args.processes)
    table, command = summarise(sweep)
    say("")
    print_tables([table], args.format)
    if args.confirm and unfinished:
        say(waiting_text(sweep, runs))
    if command:
        say(command)
    broken = failed(sweep)
    if broken:
        names = ", ".join(f"{entry.name} ({child_end(entry.exit_code or 1)})" for entry in broken)
        message = f"{len(broken)} of {len(sweep.runs)} runs failed: {names}; the same command runs them again"
        raise child_failure(message, broken[0].exit_code or 1)
    diverged = [entry.name for entry in sweep.runs if entry.status == "diverged"]
    if diverged and not command:
        raise NumericsError(f"every run diverged ({', '.join(diverged)}); give smaller learning rates")
    if diverged:
        say(f"diverged; --retry-diverged runs them again: {', '.join(diverged)}")
