"""`megatron-lion demo`: from raw text to a comparison of LION, SGD and AdamW in five to ten minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.jobs import typed_path
from megatron_lion.reproduce.recipes import (
    PAPER,
    QUICK_STEPS,
    SPLIT,
    TUNED,
    VOCAB_SIZE,
    Recipe,
    list_of_one,
    quick_words,
)
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.shipped import shipped_folder
from megatron_lion.streams import say

if TYPE_CHECKING:
    from megatron_lion.jobs import Jobs

HELP = (
    "Build a small corpus from this machine's Python documentation, train a tokenizer and three small GPT-2 (LION, SGD, AdamW) on two "
    "processes, measure their full gradients, evaluate them zero-shot on prose of another kind, and compare them"
)

# Windows without overlap over the first third of the held-out text: fifteen evaluations take under a minute.
MAX_TOKENS = 50_000
QUICK_TOKENS = 5_000


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.add_argument("--output", type=str, default="demo", help="folder for all files of the demo")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="data-parallel processes of each training; must suit the batch of the config",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"train {QUICK_STEPS} steps only: a test of the installation, without meaningful losses",
    )
    parser.add_argument(
        "--paper-rates",
        action="store_true",
        help="train LION and SGD at the paper's rates (configs/demo_paper_rates.yaml) instead of three tuned optimizers",
    )
    parser.add_argument(
        "--only-corpus",
        action="store_true",
        help="write the demo's text to the output folder (train.jsonl, held_out.txt) and exit",
    )


def run(args: Any) -> None:
    """Runs the demo's verbs one after another, all in the output folder."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.files import make_folder, write_whole
    from megatron_lion.jobs import Jobs
    from megatron_lion.reproduce.recipes import check_processes

    output = Path(args.output)
    if args.only_corpus:
        _write_corpus(output, args)
        return
    check_processes(args.processes, [_config(args.paper_rates)])
    found = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if found - {"..demo.tmp"} and ".demo" not in found:  # the temporary file of a demo that was killed at once
        raise ConfigError(f"--output {output}: not empty and not made by a demo; choose another folder")
    make_folder(output)
    write_whole(output / ".demo", b"made by megatron-lion demo\n")
    with Jobs() as jobs:
        _Demo(output, args.processes, args.quick, args.paper_rates, jobs).run()


def _config(paper_rates: bool) -> Path:
    return shipped_folder("configs") / ("demo_paper_rates.yaml" if paper_rates else "demo.yaml")


def _write_corpus(output: Path, args: Any) -> None:
    """Writes the text of --only-corpus.

    Raises:
        ConfigError: another flag was given, which would have no effect.
    """
    from megatron_lion.errors import ConfigError
    from megatron_lion.prepare.demo_corpus import build_demo_corpus

    words = {word.partition("=")[0] for word in args.parser.words}
    if others := [flag for flag in ("--processes", "--quick", "--paper-rates") if flag in words]:
        raise ConfigError(f"--only-corpus writes the text and trains nothing; omit {' and '.join(others)}")
    corpus = build_demo_corpus(output)
    say(f"{corpus.train}: {corpus.documents:,} documents, {corpus.train_bytes:,} bytes of text for training")
    say(f"{corpus.held_out}: {corpus.held_out_bytes:,} bytes of text for evaluation")


class _Demo:
    """Runs the verbs that a user would run one by one; each command line is printed before it starts."""

    def __init__(self, output: Path, processes: int, quick: bool, paper_rates: bool, jobs: Jobs) -> None:
        self.output, self.processes, self.quick, self.jobs = output, processes, quick, jobs
        self.config = typed_path(_config(paper_rates))
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
        self.summarise(runs)

    def prepare(self) -> tuple[Path, Path]:
        text, tokenizer, dataset = (self.output / name for name in ("text", "tokenizer", "data"))
        train, held_out = text / "train.jsonl", text / "held_out.txt"
        self.say("building a corpus from this machine's Python documentation, and its tokenizer")
        # Each is complete when its last file exists.
        if not held_out.is_file():
            self.verb("demo", "--only-corpus", "--output", str(text))
        if not (tokenizer / "merges.txt").is_file():
            self.verb(
                "tokenizer", "train", "--input", str(train), "--vocab-size", str(VOCAB_SIZE), "--output", str(tokenizer)
            )
        self.verb(
            "prepare", "--input", str(train), "--tokenizer", str(tokenizer), "--output", str(dataset), "--split", SPLIT
        )
        return dataset, held_out

    def pretrain(self, recipe: Recipe, dataset: Path) -> Path:
        processes = f"{self.processes} processes" if self.processes > 1 else "one process"
        self.say(f"pretraining with {OPTIMIZER_NAMES[recipe.optimizer]} on {processes}")
        folder = self.output / "runs" / recipe.optimizer
        options = ["--config", self.config, "--run_dir", str(folder), "--data.path", list_of_one(dataset),
                   "--data.cache", str(self.output / "cache"), *recipe.words()]  # fmt: skip
        self.verb("pretrain", *options, *(quick_words() if self.quick else []), distributed=True)
        return folder

    def evaluate(self, folder: Path, held_out: Path) -> None:
        self.say(f"evaluating {OPTIMIZER_NAMES[folder.name]}'s checkpoints zero-shot on prose of another kind")
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
        self.say("comparing the runs")
        self.verb("compare", *map(str, runs), "--output", str(self.output / "comparison"))

    def summarise(self, folders: list[Path]) -> None:
        """Prints the last screen, from the records on disk."""
        from megatron_lion.compare.selection import read_runs
        from megatron_lion.reproduce.headline import explanation, headline_table, next_steps

        runs = read_runs(folders)
        minutes = (time.monotonic() - self.started) / 60
        text = explanation(runs, processes=self.processes, quick=self.quick, paper_rates=self.paper_rates)
        following = next_steps(self.output, self.config, self.processes)
        sys.stdout.write(f"\ndone in {minutes:.1f} minutes\n\n{headline_table(runs)}\n\n{text}\n\n{following}\n")

    def show_text(self, folder: Path) -> None:
        self.say(f"generating three texts with {OPTIMIZER_NAMES[folder.name]}'s last checkpoint")
        self.verb("generate", str(folder), "--prompt", "Return the", "--max-new-tokens", "24", "--temperature", "0.7")

    def say(self, text: str) -> None:
        self.step_number += 1
        say(f"\n[{self.step_number}] {text}")

    def verb(self, verb: str, *words: str, distributed: bool = False) -> None:
        """Runs a verb in a child process; if it fails, ends the demo with the verb's exit code."""
        from megatron_lion.errors import StoppedOnRequest
        from megatron_lion.jobs import child_end, child_failure, shown_job

        processes = self.processes if distributed else 1
        say(f"    {shown_job(verb, list(words), processes)}")
        code = self.jobs.run(verb, list(words), processes)
        if self.jobs.asked:
            raise StoppedOnRequest(f"stopped in `megatron-lion {verb}`; the same command continues there")
        if code:
            raise child_failure(
                f"the demo stopped: `megatron-lion {verb}` ended with {child_end(code)}; see its message above", code
            )
