"""`megatron-lion scaling`: the exponent b of r = ‖∇f‖₁/‖∇f‖₂ ∝ d^b over a family of models of different d."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.streams import next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.reproduce.sources import Sources
    from megatron_lion.scaling.family import Family

HELP = (
    "Train a family of models that differ in size, measure the full gradient of each at one noise share, fit r = |grad|_1/|grad|_2 "
    "= a d^b, and judge b = 1/2 by its 95 %% interval; the same command resumes"
)

# Comments of printed commands have no quotes, brackets or backticks: an interactive zsh executes a pasted comment.
AFTER = """# The number of batches of the longer probes follows from the measured noise: without --print the same command makes
# what is missing, chooses them, and writes scaling.md.
"""
AFTER_FULL = """# When all of it is there, the same command without --print reads the probes and writes scaling.md.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("--output", type=str, default="scaling", metavar="DIR", help="folder for data, runs and results")
    add(
        "--text",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="training text, as for prepare --input; default (tiny): this machine's Python documentation",
    )
    add(
        "--tokenizer",
        type=str,
        default=None,
        metavar="FOLDER",
        help="GPT-2's tokenizer; default (tiny): a BPE of 2,048 tokens trained on the text",
    )
    add(
        "--scale",
        type=str,
        default="tiny",
        choices=["tiny", "full"],
        help="tiny: configs/demo.yaml, d of 0.1 to 4 million; full: configs/gpt2_small.yaml, d of 23 to 709 million, whose commands "
        "--print shows and which this verb does not start",
    )
    add("--widths", type=str, default=None, metavar="N,N", help="hidden sizes; default (tiny): 32,48,64,96,128,192,256")
    add(
        "--depths",
        type=str,
        default=None,
        metavar="N,N",
        help="numbers of layers, each with each width; default (tiny): 4",
    )
    add("--head-size", type=int, default=None, metavar="N", help="width of an attention head; default (tiny): 16")
    add("--base-width", type=int, default=None, metavar="N", help="width of the known rates; default (tiny): 128")
    add(
        "--optimizers",
        type=str,
        default=None,
        metavar="NAME,NAME",
        help="lion, sgd, adamw; default (tiny): all three; default (full): lion and sgd",
    )
    add(
        "--lr",
        type=str,
        default=None,
        metavar="NAME=RATE,…",
        help="rates at the base width; default (tiny): the tuned ones, default (full): the paper's; those of LION and AdamW are "
        "proportional to 1/width",
    )
    add("--seeds", type=str, default=None, metavar="N,N", help="seeds of each model; default (tiny): 1,2")
    add("--steps", type=int, default=None, metavar="N", help="steps of each run; default (tiny): 400")
    add(
        "--measure-at",
        type=str,
        default=None,
        metavar="N,N",
        help="steps at which the gradient is measured; default: before the first, in the middle, and after the last",
    )
    add("--noise-share", type=float, default=0.05, metavar="Q", help="noise share to reach")
    add("--first-batches", type=int, default=None, metavar="N", help="batches of the first probes; default (tiny): 32")
    add(
        "--max-batches",
        type=int | Literal["all"] | None,
        default=None,
        metavar="N",
        help="most batches of a probe, or all: every sample once, without noise; default (tiny): 256",
    )
    add("--processes", type=int, default=2, help="processes of this machine that train or probe together")
    add("--print", action="store_true", help="print the commands that are known before the noise is, and exit")
    add("--dry-run", action="store_true", help="print models, rates, tokens and FLOP, and exit")


def run(args: Any) -> None:
    """Makes what is missing of the family, writes scaling.json, scaling.md and scaling.png, and prints the exponents."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.reproduce.recipes import check_processes
    from megatron_lion.reproduce.sources import Sources, check_sources
    from megatron_lion.scaling.family import family_of
    from megatron_lion.scaling.family_steps import config_path

    names = ("widths", "depths", "head_size", "base_width", "optimizers", "lr", "seeds", "steps", "measure_at",
             "noise_share", "first_batches", "max_batches")  # fmt: skip
    family = family_of({name: getattr(args, name) for name in names}, args.scale)
    if args.scale == "tiny":
        check_processes(args.processes, [config_path(family)])
    elif args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: must be at least 1")
    elif missing := [flag for flag, given in (("--text", args.text), ("--tokenizer", args.tokenizer)) if not given]:
        raise ConfigError(f"--scale full: needs {' and '.join(missing)}: the full scale has no substitutes for them")
    sources = Sources(
        text=tuple(args.text), tokenizer=args.tokenizer, vocab=None, wikitext103=None, output=Path(args.output),
        processes=args.processes,
    )  # fmt: skip
    if args.print:
        sys.stdout.write(_commands(family, sources))
    elif args.dry_run:
        _preview(family, sources)
    else:
        if args.scale == "tiny":
            check_sources(sources)
            _make(family, sources)
        _report(family, sources.output)


def _commands(family: Family, sources: Sources) -> str:
    """The text of --print."""
    import shlex

    from megatron_lion.commands.reproduce import NODES
    from megatron_lion.scaling.family_steps import all_steps

    text = NODES.format(python=shlex.quote(sys.executable)) if family.scale == "full" else ""
    for step in all_steps(family, sources):
        text += f"# {step.title}\n{step.shown(sources.processes)}\n"
    return text + (AFTER_FULL if family.scale == "full" else AFTER)


def _preview(family: Family, sources: Sources) -> None:
    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.scaling.family_preview import preview

    table, text = preview(family, sources)
    print_tables([table])
    sys.stdout.write(text)


def _make(family: Family, sources: Sources) -> None:
    from megatron_lion.jobs import Jobs
    from megatron_lion.scaling.family_steps import run_family

    with Jobs() as jobs:
        run_family(family, sources, jobs)


def _report(family: Family, output: Path) -> None:
    """Writes the results and prints the exponents."""
    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.files import write_whole
    from megatron_lion.scaling.family_figure import draw_family
    from megatron_lion.scaling.family_results import as_content, fits_of, read_family, write_results
    from megatron_lion.scaling.family_tables import as_markdown, fit_table

    measured = read_family(family, output)
    fits = fits_of(measured)
    write_results(output, as_content(family, measured, fits))
    draw_family(fits, output / "scaling.png")
    write_whole(output / "scaling.md", as_markdown(family, measured, fits, "scaling.png").encode())
    print_tables([fit_table(fits)])
    say(f"written: {output}/scaling.md, scaling.json, scaling.png")
    next_steps(["megatron-lion", "compare", *(str(output / "runs" / run.name) for run in family.runs()[:2])])
