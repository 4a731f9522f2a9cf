"""`megatron-lion reproduce`: makes the paper's tables and figures and compares them with the paper."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_lion.streams import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = (
    "Make the paper's tables and figures and compare them with the paper; reproduction.md lists each value with ours, tolerance, "
    "convention and source. The tiny scale runs on two CPU cores; the full scale needs 16 A100 GPUs"
)


NODES = """# On each of two nodes with eight A100s: export NNODES=2 NPROC_PER_NODE=8 MASTER_ADDR=10.0.0.1 NODE_RANK=0 (1 on the other)
# JOB_ID=… (a random word, the same on both; docs/launching.md).
# Then run `megatron-lion reproduce … --scale full`. It runs these commands; all but the trainings on NODE_RANK 0 alone.

"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    names = Literal["table-b1", "figure-2", "figure-3", "toy", "rates"]
    add(
        "artefacts",
        type=names,
        nargs="+",
        metavar="ARTEFACT",
        help="table-b1, figure-2, figure-3, toy or rates; several share their data and runs",
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
    add("--print", action="store_true", help="print the commands and exit")
    add(
        "--quick",
        action="store_true",
        help="the tiny scale with a few steps, in DIR/quick: a test of the installation, without meaningful values",
    )


def run(args: Any) -> None:
    """Runs the plans, writes reproduction.md and reproduction.json, and prints the tables."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.reproduce.artefacts import build_plan
    from megatron_lion.reproduce.sources import Sources, check_sources

    if args.processes < 1 or 8 % args.processes:
        raise ConfigError(f"--processes {args.processes}: must divide the batch of 8 samples; give 1, 2, 4 or 8")
    if args.quick and args.scale == "full":
        raise ConfigError("--quick works with --scale tiny only; omit one of them")
    sources = Sources(
        text=tuple(args.text), tokenizer=args.tokenizer, vocab=args.vocab, wikitext103=args.wikitext103,
        output=Path(args.output) / "quick" if args.quick else Path(args.output), processes=args.processes, quick=args.quick,
    )  # fmt: skip
    plans = [build_plan(name, args.scale, sources) for name in dict.fromkeys(args.artefacts)]
    if args.print:
        if args.scale == "full":
            sys.stdout.write(NODES)
        for plan in plans:
            lines = [f"# {step.title}\n{step.shown(args.processes)}" for step in plan.steps]
            sys.stdout.write(f"## {plan.artefact}, {plan.scale} scale\n" + "\n".join(lines) + "\n\n")
        return
    check_sources(sources)
    _earlier(sources.output)  # raises if reproduction.json is damaged: now, not after hours of runs
    _run_plans(plans, sources, args.processes)
    _report(plans, sources)


def _run_plans(plans: list[Any], sources: Any, processes: int) -> None:
    from megatron_lion.jobs import Jobs
    from megatron_lion.reproduce.run_verbs import need_gpus, run_plan
    from megatron_lion.reproduce.sources import make_missing

    if any(plan.scale == "full" and plan.needs for plan in plans):
        need_gpus()
    total, first = sum(len(plan.steps) for plan in plans), 1
    with Jobs() as jobs:
        for plan in plans:
            if plan.needs and plan.scale == "tiny":
                make_missing(sources, plan.needs, say)
            run_plan(plan, processes, jobs, first=first, total=total)
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
    from megatron_lion.reproduce.claims import as_markdown, claims_of

    output, quick = sources.output, " (quick)" if sources.quick else ""
    found = {f"{plan.artefact}/{plan.scale}{quick}": claims_of(plan) for plan in plans}
    make_folder(output)
    content = {**_earlier(output), **found}
    record = {key: [asdict(claim) for claim in claims] for key, claims in content.items()}
    write_whole(output / "reproduction.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    sections = {key: as_markdown(key, claims) for key, claims in content.items()}
    write_whole(output / "reproduction.md", "\n".join(sections.values()).encode())
    sys.stdout.write("\n".join(sections[key] for key in found))
    folders = [str(plan.comparison) for plan in plans if plan.comparison is not None]
    say(
        f"\nwritten: {output}/reproduction.md, reproduction.json"
        + "".join(f", {folder}/report.html" for folder in folders)
    )
