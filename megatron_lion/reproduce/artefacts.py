"""Plans of the paper's artefacts: the subcommands with their arguments, in order. Each step can be resumed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_lion.errors import ConfigError
from megatron_lion.reproduce.recipes import PAPER, SPLIT, TUNED, Recipe, quick_words
from megatron_lion.reproduce.sources import Sources
from megatron_lion.shipped import shipped_folder

Scale = Literal["tiny", "full"]
ARTEFACTS = {
    "table-b1": "zero-shot WikiText-103 log perplexity of GPT-2 at five checkpoints, LION and SGD",
    "figure-2": "BERT: training loss, test loss, norm ratio",
    "figure-3": "GPT-2: training loss, test loss, norm ratio",
    "toy": "the two-dimensional experiment: both sides of the inequality",
    "rates": "the tightest constants c_LION and c_SGD of the K^(-1/4) rate",
}
RATE_SEEDS = (1, 2, 3)
TINY_PROBES = ("--probe.num_batches", "32")
"""The demo's 8 batches leave so much noise in r at tuned rates that nothing can be concluded from it."""


@dataclass(frozen=True)
class Step:
    """One subcommand of a plan.

    Attributes:
        title: title for the log.
        verb: name of the subcommand, such as "pretrain".
        words: arguments.
        spread: whether it runs on several processes: those of this machine, or of all nodes if it is `launched`.
        launched: whether launch/torchrun.sh starts it, instead of this process.
    """

    title: str
    verb: str
    words: tuple[str, ...]
    spread: bool = False
    launched: bool = False

    def shown(self, processes: int) -> str:
        """The command line, as typed in the repository."""
        words = [word.replace(f"{shipped_folder('configs')}/", "configs/") for word in self.words]
        if self.launched:
            place = words.index("--config")
            return shlex.join(["launch/torchrun.sh", words[place + 1], *words[:place], *words[place + 2 :]])
        start = (
            f"python -m megatron_lion.launcher --processes {processes}"
            if self.spread and processes > 1
            else "megatron-lion"
        )
        return f"{start} {self.verb} {shlex.join(words)}"


@dataclass(frozen=True)
class Plan:
    """The steps of an artefact and the runs that they make.

    Attributes:
        artefact, scale: names of the artefact and its scale, "tiny" or "full".
        needs: kind of the data that must exist first: "gpt2", "bert", or "" for none.
        steps: the steps in order.
        paper_runs: run folders at the paper's rates, by "model/optimizer".
        tuned_runs: run folders at tuned rates, by "model/optimizer".
        seeds: run folders of several seeds, by optimizer.
        comparison: folder of tables and figures, or None.
    """

    artefact: str
    scale: Scale
    needs: str
    steps: tuple[Step, ...]
    paper_runs: dict[str, Path] = field(default_factory=dict)
    tuned_runs: dict[str, Path] = field(default_factory=dict)
    seeds: dict[str, list[Path]] = field(default_factory=dict)
    comparison: Path | None = None


def build_plan(artefact: str, scale: Scale, sources: Sources) -> Plan:
    """The plan of an artefact.

    Raises:
        ConfigError: the full scale lacks the text, the tokenizer or vocabulary, or WikiText-103.
    """
    if artefact == "toy":
        words = ("--output", str(sources.output / "toy"))
        return Plan(artefact, scale, "", (Step("the two-dimensional experiment", "toy", words),))
    if scale == "full":
        return _full(artefact, sources)
    return _tiny_rates(sources) if artefact == "rates" else _tiny(artefact, sources)


def data_folder(kind: str, output: Path) -> Path:
    """Folder of the token files for a kind of model."""
    return output / f"data-{kind}"


def _prepare(kind: str, sources: Sources) -> Step:
    """The step from text to tokens; `sources.make_missing` creates the files that are not given before the first step."""
    output = sources.output
    text = sources.text or (str(output / "text" / "train.jsonl"),)
    tokenizer = (
        (sources.tokenizer or str(output / "bpe")) if kind == "gpt2" else (sources.vocab or str(output / "wordpiece"))
    )
    task = () if kind == "gpt2" else ("--task", "bert")
    split = () if sources.text and not sources.is_small else ("--split", SPLIT)
    words = ("--input", *text, "--tokenizer", tokenizer, "--output", str(data_folder(kind, output)), *task, *split)
    return Step(f"{kind}: text to tokens", "prepare", words)


def _pretrain(
    config: Path, run_dir: Path, kind: str, recipe: Recipe, sources: Sources, *more: str, launched: bool = False
) -> Step:
    words = ["--config", str(config), "--run_dir", str(run_dir), "--data.path", f"[{data_folder(kind, sources.output)}]",
             *recipe.words(), *more]  # fmt: skip
    if not launched:
        words += ["--data.cache", str(sources.output / "cache"), *(quick_words() if sources.quick else [])]
    title = f"{run_dir.name}: {recipe.optimizer.upper()} at {recipe.lr:g}"
    return Step(title, "pretrain", tuple(words), spread=True, launched=launched)


def _evaluate(run_dir: Path, sources: Sources, *more: str) -> Step:
    held_out = str(sources.output / "text" / "held_out.txt")
    text = ("--wikitext103", sources.wikitext103, "--pages", "false") if sources.wikitext103 else ("--text", held_out)
    return Step(
        f"{run_dir.name}: zero-shot perplexity", "evaluate", (str(run_dir), "--steps", "all", *text, *more), spread=True
    )


def _compare(runs: list[Path], folder: Path) -> Step:
    return Step("tables and figures", "compare", (*map(str, runs), "--output", str(folder)))


def _tiny(artefact: str, sources: Sources) -> Plan:
    """One small model at the paper's rates and at tuned ones; table-b1 and figure-3 share their runs."""
    kind = "bert" if artefact == "figure-2" else "gpt2"
    config = shipped_folder("configs") / ("bert_demo.yaml" if kind == "bert" else "demo.yaml")
    steps = [_prepare(kind, sources)]
    paper: dict[str, Path] = {}
    tuned: dict[str, Path] = {}
    for found, recipes, mark in ((paper, PAPER, "-paper-rate"), (tuned, TUNED[kind], "")):
        for recipe in recipes:
            run_dir = sources.output / "runs" / f"{kind}-{recipe.optimizer}{mark}"
            found[f"{kind}/{recipe.optimizer}"] = run_dir
            steps.append(_pretrain(config, run_dir, kind, recipe, sources, *TINY_PROBES))
    runs = [*paper.values(), *tuned.values()]
    if artefact == "table-b1":
        # Windows overlap as in the paper's convention. The first 30,000 tokens are enough for a small model.
        some = ("--max-tokens", "2000" if sources.quick else "30000")
        steps += [_evaluate(run_dir, sources, *some) for run_dir in runs]
    folder = sources.output / f"comparison-{artefact}"
    return Plan(artefact, "tiny", kind, (*steps, _compare(runs, folder)), paper, tuned, comparison=folder)


def _tiny_rates(sources: Sources) -> Plan:
    """LION and SGD with three seeds each, probed every 8 steps, since the constants are maxima over K."""
    steps = [_prepare("gpt2", sources)]
    seeds: dict[str, list[Path]] = {}
    often = ("--train.steps", "160", "--checkpoint.at_steps", "[]", "--probe.every", "8", "--probe.num_batches", "4",
             "--train.test_every", "0")  # fmt: skip
    config = shipped_folder("configs") / "demo.yaml"
    for recipe in TUNED["gpt2"][:2]:
        seeds[recipe.optimizer] = [
            sources.output / "runs" / f"rates-{recipe.optimizer}-seed{seed}" for seed in RATE_SEEDS
        ]
        steps += [
            _pretrain(config, run_dir, "gpt2", recipe, sources, *often, "--seed", str(seed))
            for run_dir, seed in zip(seeds[recipe.optimizer], RATE_SEEDS, strict=True)
        ]
    return Plan("rates", "tiny", "gpt2", tuple(steps), seeds=seeds)


_FULL = {
    "table-b1": ("gpt2", ("gpt2_small", "gpt2_medium")),
    "figure-3": ("gpt2", ("gpt2_small", "gpt2_medium")),
    "figure-2": ("bert", ("bert_small", "bert_base")),
    "rates": ("gpt2", ("gpt2_small",)),
}


def _full(artefact: str, sources: Sources) -> Plan:
    """The paper's runs on 16 A100s; launch/torchrun.sh starts them on each node."""
    kind, names = _FULL[artefact]
    needed = [("--text", bool(sources.text)), ("--tokenizer", kind != "gpt2" or sources.tokenizer is not None)]
    needed += [("--vocab", kind != "bert" or sources.vocab is not None)]
    needed += [("--wikitext103", artefact != "table-b1" or sources.wikitext103 is not None)]
    if missing := [flag for flag, given in needed if not given]:
        raise ConfigError(
            f"reproduce {artefact} --scale full: needs {', '.join(missing)}: the full scale has no substitutes for them"
        )
    steps = [_prepare(kind, sources)]
    paper: dict[str, Path] = {}
    seeds: dict[str, list[Path]] = {}
    for name in names:
        for recipe in PAPER:
            config = shipped_folder("configs") / f"{name}.yaml"
            run_dir = sources.output / "runs" / f"{name.replace('_', '-')}-{recipe.optimizer}"
            paper[f"{name.replace('_', '-')}/{recipe.optimizer}"] = run_dir
            seeds.setdefault(recipe.optimizer, []).append(run_dir)
            steps.append(_pretrain(config, run_dir, kind, recipe, sources, launched=True))
    if artefact == "table-b1":
        steps += [_evaluate(run_dir, sources) for run_dir in paper.values()]
    if artefact == "rates":
        return Plan(artefact, "full", kind, tuple(steps), seeds=seeds)
    folder = sources.output / f"comparison-{artefact}"
    return Plan(artefact, "full", kind, (*steps, _compare(list(paper.values()), folder)), paper, comparison=folder)
