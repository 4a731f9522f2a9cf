"""`megatron-lion demo`: from raw text to a comparison of LION, SGD and AdamW, on any machine, in about five minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.reproduce.recipes import (
    PAPER,
    QUICK_STEPS,
    SPLIT,
    TUNED,
    VOCAB_SIZE,
    Recipe,
    quick_words,
)
from megatron_lion.shipped import shipped_folder

if TYPE_CHECKING:
    from megatron_lion.jobs import Jobs

HELP = (
    "Build a small corpus from this machine's Python documentation, train a tokenizer and a small GPT-2 with LION, SGD and AdamW on "
    "two processes, probe the full gradient, evaluate zero-shot on prose of another kind, and compare"
)

# Windows without overlap over the first third of the held-out text: fifteen evaluations in under a minute.
MAX_TOKENS = 50_000
QUICK_TOKENS = 5_000


def add_arguments(parser: Any) -> None:
    parser.add_argument("--output", type=str, default="demo", help="folder for everything the demo makes")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together (data parallel)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps only: shows that the path works, not how it ends"
    )
    parser.add_argument(
        "--paper-rates",
        action="store_true",
        help="LION and SGD at the paper's rates (configs/demo_paper_rates.yaml) instead of three tuned optimizers",
    )


def run(args: Any) -> None:
    from megatron_lion.errors import ConfigError
    from megatron_lion.jobs import Jobs

    output = Path(args.output)
    if args.processes < 1 or 16 % args.processes:
        raise ConfigError(
            f"--processes {args.processes}: the demo's batches of 16 samples divide over 1, 2, 4, 8 or 16 processes"
        )
    if output.is_dir() and any(output.iterdir()) and not (output / ".demo").is_file():
        raise ConfigError(f"--output {output}: not empty and not made by a demo; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    (output / ".demo").write_text("made by megatron-lion demo\n")
    with Jobs() as jobs:
        _Demo(output, args.processes, args.quick, args.paper_rates, jobs).run()


class _Demo:
    """The verbs that a user would give one by one, in order, each shown before it runs."""

    def __init__(self, output: Path, processes: int, quick: bool, paper_rates: bool, jobs: Jobs) -> None:
        self.output, self.processes, self.quick, self.jobs = output, processes, quick, jobs
        self.config = shipped_folder("configs") / ("demo_paper_rates.yaml" if paper_rates else "demo.yaml")
        self.paper_rates = paper_rates
        self.started = time.monotonic()
        self.step_number = 0

    def run(self) -> None:
        dataset, held_out = self.prepare()
        runs = [self.pretrain(recipe, dataset) for recipe in (PAPER if self.paper_rates else TUNED["gpt2"])]
        for folder in runs:
            self.evaluate(folder, held_out)
        self.show_text(runs[0])
        self.compare(runs)

    def prepare(self) -> tuple[Path, Path]:
        from megatron_lion.prepare.demo_corpus import build_demo_corpus
        from megatron_lion.prepare.vocabularies import train_bpe

        self.say("a corpus from this machine's Python documentation, and a tokenizer for it")
        corpus = build_demo_corpus(self.output / "text")
        train_bpe([corpus.train], VOCAB_SIZE, self.output / "tokenizer")
        dataset = self.output / "data"
        self.verb("prepare", "--input", str(corpus.train), "--tokenizer", str(self.output / "tokenizer"), "--output", str(dataset),
                  "--split", SPLIT)  # fmt: skip
        return dataset, corpus.held_out

    def pretrain(self, recipe: Recipe, dataset: Path) -> Path:
        self.say(f"pretraining with {recipe.optimizer.upper()} on {self.processes} processes")
        folder = self.output / "runs" / recipe.optimizer
        options = ["--config", str(self.config), "--run_dir", str(folder), "--data.path", f"[{dataset}]",
                   "--data.cache", str(self.output / "cache"), *recipe.words()]  # fmt: skip
        self.verb("pretrain", *options, *(quick_words() if self.quick else []), distributed=True)
        return folder

    def evaluate(self, folder: Path, held_out: Path) -> None:
        self.say(f"zero-shot perplexity of {folder.name.upper()}'s checkpoints on prose of another kind")
        quick = ["--max-tokens", str(QUICK_TOKENS if self.quick else MAX_TOKENS)]
        self.verb(
            "evaluate",
            str(folder),
            "--steps",
            "all",
            "--text",
            str(held_out),
            "--stride",
            "full",
            *quick,
            distributed=True,
        )

    def compare(self, runs: list[Path]) -> None:
        self.say("the comparison")
        self.verb("compare", *map(str, runs), "--output", str(self.output / "comparison"))
        minutes = (time.monotonic() - self.started) / 60
        rates = "the paper's rates" if self.paper_rates else "rates of a small grid (benchmarks/results/rates_demo.md)"
        sys.stdout.write(
            f"\ndone in {minutes:.1f} minutes, each optimizer at {rates}\n"
            f"  {self.output}/comparison   tables and figures\n"
            f"  {self.output}/runs         one folder a run: config.yaml, metrics.jsonl, checkpoints/, eval/\n"
        )

    def show_text(self, folder: Path) -> None:
        self.say(f"three lines by {folder.name.upper()}'s last checkpoint, after a minute of training")
        self.verb("generate", str(folder), "--prompt", "Return the", "--max-new-tokens", "24", "--temperature", "0.7")

    def say(self, text: str) -> None:
        self.step_number += 1
        sys.stderr.write(f"\n[{self.step_number}] {text}\n")
        sys.stderr.flush()

    def verb(self, verb: str, *words: str, distributed: bool = False) -> None:
        """Runs a verb in a process of its own and ends the demo with its code if it fails."""
        from megatron_lion.errors import MegatronLionError, StoppedOnRequest

        sys.stderr.write(f"    megatron-lion {verb} {' '.join(words)}\n")
        sys.stderr.flush()
        code = self.jobs.run(verb, list(words), self.processes if distributed else 1)
        if self.jobs.asked:
            raise StoppedOnRequest(f"stopped in `megatron-lion {verb}`; the same command goes on there")
        if code:
            error = MegatronLionError(f"the demo stopped: `megatron-lion {verb}` ended with code {code}; see above")
            error.exit_code = code if code > 0 else 1
            raise error
