"""`megatron-lion theory`: rate constants of runs, and the settings that Corollary 3 gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_lion.streams import next_steps

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "Compute the tightest rate constants of runs, estimate smoothness L, noise variance sigma^2 and gap Delta, and print the settings "
    "that Corollary 3 gives"
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


def run(args: Any) -> None:
    """Prints Markdown to stdout; in a terminal, its tables are laid out for the terminal's width."""
    from megatron_lion.compare.print_tables import print_markdown
    from megatron_lion.errors import ConfigError

    _check_numbers(args)
    try:
        text = _from_numbers(args) if not args.runs else _from_runs(args)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print_markdown(text + "\n")
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
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence is {args.confidence:g}: give a number between 0 and 1, such as 0.95")


def _from_numbers(args: Any) -> str:
    from megatron_lion.errors import ConfigError
    from megatron_lion.theory.advice import HONESTY, advice_table, advise

    missing = [_flag(name) for name in NUMBERS if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"without a RUN, these flags are needed: {' '.join(missing)}")
    advice = advise(args.steps, L=args.smoothness, noise_variance=args.noise_variance, gap=args.gap, d=args.dimension)
    title = f"K = {args.steps}, d = {args.dimension:,}"
    return "\n\n".join([title, advice_table([("given", advice)]), *HONESTY])


def _from_runs(args: Any) -> str:
    from megatron_lion.runs.record import read_run
    from megatron_lion.theory.advice import HONESTY
    from megatron_lion.theory.rate_report import advice_section, rates_section

    records = [read_run(path) for path in args.runs]
    parts = ["## Rate constants", rates_section(records, args.weighting, args.confidence)]
    for record in records:
        parts += [
            f"## Corollary 3 for {record.folder}",
            advice_section(
                record,
                args.steps,
                smoothness=args.smoothness,
                noise_variance=args.noise_variance,
                gap=args.gap,
                confidence=args.confidence,
            ),
        ]
    return "\n\n".join([*parts, "## Limits", *HONESTY])
