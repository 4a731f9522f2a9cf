"""`megatron-lion reproduce`: makes the paper's tables and figures and compares them with the paper."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.streams import next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.reproduce.artefacts import Plan

HELP = (
    "Make the paper's tables and figures and compare them with the paper; reproduction.md lists each value with ours, tolerance, "
    "convention and source. The tiny scale runs on two CPU cores; the full scale needs 16 A100 GPUs. The paper's Figure 1 (image "
    "classifiers) is missing, because this project trains no vision models"
)

# Comments of printed commands have no quotes, brackets or backticks: an interactive zsh executes a pasted comment.
NODES = """# On each of two nodes with eight A100s, export NNODES=2 NPROC_PER_NODE=8 MASTER_ADDR=10.0.0.1, NODE_RANK=0 on one
# and NODE_RANK=1 on the other, and JOB_ID, a random word that is the same on both: see docs/launching.md.
# Start the trainings on both nodes, the other commands on the first alone.
export PYTHON={python}
"""
AFTER = "# Without --print the same command runs what is missing, compares with the paper and writes reproduction.md.\n"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    names = Literal["table-b1", "figure-2", "figure-3", "toy", "rates", "batches", "scaling"]
    add(
        "artefacts",
        type=names,
        nargs="+",
        metavar="ARTEFACT",
        help="table-b1, figure-2, figure-3, toy, rates, batches or scaling; several share their data and runs; the paper's figure-1 is not "
        "reproduced",
    )
    add(
        "--scale",
        type=str,
        default="tiny",
        choices=["tiny", "full"],
        help="tiny: small models, minutes on two cores; full: the paper's models and steps",
    )
    add(
        "--output",
        type=str,
        default="reproduction",
        metavar="DIR",
        help="folder for data, runs, figures and reproduction.md",
    )
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
        help="GPT-2's tokenizer; default (tiny): a BPE trained on the text",
    )
    add(
        "--vocab",
        type=str,
        default=None,
        metavar="FILE",
        help="BERT's vocab.txt; default (tiny): a WordPiece trained on the text",
    )
    add(
        "--wikitext103",
        type=str,
        default=None,
        metavar="FILE",
        help="wiki.test.tokens of WikiText-103; default (tiny): held-out prose of another kind",
    )
    add(
        "--processes",
        type=int,
        default=2,
        help="processes of this machine that train together (tiny) or evaluate (full)",
    )
    add(
        "--print",
        action="store_true",
        help="print all commands, from the text to the comparison, and exit; each can be pasted",
    )
    add(
        "--quick",
        action="store_true",
        help="the tiny scale with a few steps, in DIR/quick: a test of the installation, without meaningful values",
    )


def run(args: Any) -> None:
    """Runs the plans, writes reproduction.md and reproduction.json, and prints what was found."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.reproduce.artefacts import build_plan
    from megatron_lion.reproduce.sources import Sources, check_sources

    _check_processes(args)
    if args.quick and args.scale == "full":
        raise ConfigError("--quick works with --scale tiny only; omit one of them")
    sources = Sources(
        text=tuple(args.text), tokenizer=args.tokenizer, vocab=args.vocab, wikitext103=args.wikitext103,
        output=Path(args.output) / "quick" if args.quick else Path(args.output), processes=args.processes, quick=args.quick,
    )  # fmt: skip
    plans = [build_plan(name, args.scale, sources) for name in dict.fromkeys(args.artefacts)]
    if args.print:
        sys.stdout.write(_commands(plans, args))
        return
    check_sources(sources)
    _earlier(sources.output)  # raises if reproduction.json is damaged: now, not after hours of runs
    _run_plans(plans, sources, args.processes)
    _report(plans, sources)


def _check_processes(args: Any) -> None:
    """Checks --processes against the configs of the trainings; at the full scale, launch/torchrun.sh starts those."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.reproduce.artefacts import tiny_config
    from megatron_lion.reproduce.recipes import check_processes

    if args.scale == "tiny":
        check_processes(
            args.processes, list(dict.fromkeys(tiny_config(name) for name in args.artefacts if name != "toy"))
        )
    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: must be at least 1")


def _commands(plans: list[Plan], args: Any) -> str:
    """The text of --print: each command once, although several artefacts may need it."""
    import shlex

    text = NODES.format(python=shlex.quote(sys.executable)) if args.scale == "full" else ""
    shown: set[str] = set()
    for plan in plans:
        text += f"## {plan.artefact}, {plan.scale} scale\n"
        for step in plan.steps:
            if (line := step.shown(args.processes)) not in shown:
                shown.add(line)
                text += f"# {step.title}\n{line}\n"
        text += "\n"
    return text + AFTER


def _run_plans(plans: list[Plan], sources: Any, processes: int) -> None:
    from megatron_lion.jobs import Jobs
    from megatron_lion.reproduce.artefacts import Step
    from megatron_lion.reproduce.run_verbs import need_gpus, run_plan
    from megatron_lion.reproduce.sources import note_text

    if any(plan.scale == "full" and plan.needs for plan in plans):
        need_gpus()

    def check(step: Step) -> None:
        if step.verb in ("tokenizer", "prepare") and plan.scale == "tiny":
            note_text(sources)

    total, first = sum(len(plan.steps) for plan in plans), 1
    with Jobs() as jobs:
        for plan in plans:
            run_plan(plan, processes, jobs, first=first, total=total, check=check)
            first += len(plan.steps)


def _earlier(output: Path) -> dict[str, Any]:
    """Returns the claims in an earlier call's reproduction.json by "artefact/scale"; empty if there is none.

    Raises:
        DataError: the file is damaged.
    """
    import json

    from megatron_lion.errors import DataError
    from megatron_lion.reproduce.claim import Claim

    path = output / "reproduction.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: [Claim(**claim) for claim in claims] for key, claims in found.items()}
    except (ValueError, TypeError, AttributeError, OSError):
        raise DataError(
            f"{path}: damaged; delete or rename it, then give the same command again; finished runs are kept"
        ) from None


def _report(plans: list[Any], sources: Any) -> None:
    """Writes the claims of all calls so far, and prints those of this call."""
    import json
    from dataclasses import asdict

    from megatron_lion.files import make_folder, write_whole
    from megatron_lion.reproduce.claims import as_markdown, as_text, claims_of

    output, quick = sources.output, " (quick)" if sources.quick else ""
    found = {f"{plan.artefact}/{plan.scale}{quick}": claims_of(plan) for plan in plans}
    make_folder(output)
    content = {**_earlier(output), **found}
    record = {key: [asdict(claim) for claim in claims] for key, claims in content.items()}
    write_whole(output / "reproduction.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    sections = {key: as_markdown(key, claims) for key, claims in content.items()}
    write_whole(output / "reproduction.md", "\n".join(sections.values()).encode())
    sys.stdout.write("\n".join(as_text(key, claims) for key, claims in found.items()))
    folders = [str(plan.comparison) for plan in plans if plan.comparison is not None]
    say(
        f"\nwritten: {output}/reproduction.md, reproduction.json"
        + "".join(f", {folder}/report.html" for folder in folders)
    )
    next_steps(*(f"open {Path(folder, 'report.html').resolve().as_uri()} in a browser" for folder in folders))
