"""`megatron-lion theory`: rate constants and slopes of runs, the bound at their settings, and those that Corollary 3 gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.streams import next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.runs.record import RunRecord
    from megatron_lion.theory.run_bounds import RunBound

HELP = (
    "Compute rate constants and slopes of runs, estimate smoothness L, noise variance sigma^2 and gap Delta, compare the mean KKT "
    "residual with the bound at a run's own settings, and print the settings that Corollary 3 gives"
)


NUMBERS = ("steps", "smoothness", "noise_variance", "gap", "dimension")
"""Flags, as attributes, that replace the values of a run."""


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add(
        "runs",
        type=str,
        nargs="*",
        default=[],
        metavar="RUN",
        help="run folders that differ in their seed only; if none, give --steps, --smoothness, --noise-variance, --gap, --dimension",
    )
    add(
        "--steps",
        type=int,
        default=None,
        metavar="K",
        help="number of steps to plan; default: the steps of the run's schedule",
    )
    add(
        "--smoothness",
        type=float,
        default=None,
        metavar="L",
        help="smoothness constant L; default: the run's lower bound",
    )
    add("--noise-variance", type=float, default=None, help="sigma^2 of a global batch; default: the run's estimate")
    add("--gap", type=float, default=None, metavar="DELTA", help="f(theta_1) - f*; default: the run's estimate")
    add("--dimension", type=int, default=None, metavar="D", help="number of parameters, if no RUN is given")
    add(
        "--weighting",
        type=str,
        default="linear",
        choices=["linear", "hold", "probes"],
        help="norms between probes: linear interpolation, hold the last probe's, or average over probes instead of steps",
    )
    add("--confidence", type=float, default=0.95, help="confidence level of all intervals and bounds")
    add(
        "--output",
        type=str,
        default=None,
        metavar="DIR",
        help="folder for figures: the bound beside the measured mean of each LION run, and the curves of the rate constants; "
        "default: no figures",
    )


def run(args: Any) -> None:
    """Prints Markdown to stdout; in a terminal, its tables are laid out for the terminal's width."""
    from megatron_lion.compare.print_tables import print_markdown
    from megatron_lion.errors import ConfigError

    _check_numbers(args)
    try:
        text, figures = (_from_numbers(args), []) if not args.runs else _from_runs(args)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print_markdown(text + "\n")
    if figures:
        say(f"\nwritten: {', '.join(map(str, figures))}")
    if args.runs:
        next_steps(["megatron-lion", "compare", *map(str, args.runs)])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_numbers(args: Any) -> None:
    """Raises ConfigError for a number outside its range; the parser rejects those that are not finite."""
    from megatron_lion.errors import ConfigError

    for name in NUMBERS:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{_flag(name)} is {value:g}: give a number above 0")
    if args.output == "":
        raise ConfigError("--output is empty: give a folder")
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence is {args.confidence:g}: give a number between 0 and 1, such as 0.95")


def _check_runs(records: list[RunRecord]) -> None:
    """Raises ConfigError if a run is given twice, or runs differ in more than their seed: no interval would be valid."""
    from megatron_lion.compare.labels import differing_settings, seed_groups
    from megatron_lion.errors import ConfigError

    places = [Path(record.folder).resolve() for record in records]
    twice = next((record for record, place in zip(records, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice.folder}: the same run is given twice")
    if len(seed_groups(records)) > 1:
        keys = [key for key in differing_settings(records) if key != "seed"]
        names = f" ({', '.join(keys[:5])}{', …' if len(keys) > 5 else ''})" if keys else ""
        raise ConfigError(
            f"the runs differ in more than their seed{names}; give runs of one setting, one command for each"
        )


def _from_numbers(args: Any) -> str:
    from megatron_lion.errors import ConfigError
    from megatron_lion.theory.advice import HONESTY, advice_table, advise

    if args.output is not None:
        raise ConfigError("--output draws runs: give a RUN")
    missing = [_flag(name) for name in NUMBERS if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"without a RUN, these flags are needed: {' '.join(missing)}")
    advice = advise(args.steps, L=args.smoothness, noise_variance=args.noise_variance, gap=args.gap, d=args.dimension)
    title = f"K = {args.steps}, d = {args.dimension:,}"
    return "\n\n".join([title, advice_table([("given", advice)]), *HONESTY])


def _from_runs(args: Any) -> tuple[str, list[Path]]:
    from megatron_lion.runs.record import read_run
    from megatron_lion.theory.advice import HONESTY
    from megatron_lion.theory.bound_report import bound_section, slopes_section
    from megatron_lion.theory.rate_report import advice_section, rates_section
    from megatron_lion.theory.run_bounds import run_bound

    records = [read_run(path) for path in args.runs]
    _check_runs(records)
    parts = ["## Rate constants", rates_section(records, args.weighting, args.confidence)]
    parts += ["## Slopes over log K", slopes_section(records, args.weighting, args.confidence)]
    numbers = {
        "smoothness": args.smoothness, "noise_variance": args.noise_variance, "gap": args.gap, "confidence": args.confidence
    }  # fmt: skip
    bounds = [run_bound(record, weighting=args.weighting, **numbers) for record in records]
    for record, bound in zip(records, bounds, strict=True):
        parts += [
            f"## Corollary 3 for {record.folder}",
            advice_section(record, args.steps, **numbers),
            f"## Bound at the settings of {record.folder}",
            bound_section(bound),
        ]
    figures = _figures(Path(args.output), records, bounds, args.weighting) if args.output is not None else []
    return "\n\n".join([*parts, "## Limits", *HONESTY]), figures


def _figures(folder: Path, records: list[RunRecord], bounds: list[RunBound | None], weighting: Any) -> list[Path]:
    """Draws rate_constants.png, and bound.png of each run with one; several runs are numbered in their order."""
    from megatron_lion.files import make_folder
    from megatron_lion.theory.bound_figures import plot_bound, plot_rates

    make_folder(folder)
    drawn = [plot_rates(records, weighting, folder / "rate_constants.png")]
    for number, (record, bound) in enumerate(zip(records, bounds, strict=True), 1):
        if bound is not None:
            name = "bound.png" if len(records) == 1 else f"bound_{number}.png"
            drawn.append(plot_bound(bound, record.folder.name, folder / name))
    return drawn
