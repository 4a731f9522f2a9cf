"""Plans of the paper's artefacts: the subcommands with their arguments, in order. Each step can be resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_lion.configfile import load_config
from megatron_lion.errors import ConfigError
from megatron_lion.jobs import shell_line, shown_job, typed_path
from megatron_lion.prepare.demo_corpus import MAX_TRAIN_BYTES
from megatron_lion.prepare.find_files import find_inputs
from megatron_lion.reproduce.recipes import PAPER, SPLIT, TUNED, VOCAB_SIZE, Recipe, list_of_one, quick_words
from megatron_lion.reproduce.sources import Sources
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.shipped import shipped_folder

Scale = Literal["tiny", "full"]
ARTEFACTS = {
    "table-b1": "zero-shot WikiText-103 log perplexity of GPT-2 at five checkpoints, LION and SGD",
    "figure-2": "BERT: training loss, test loss, norm ratio",
    "figure-3": "GPT-2: training loss, test loss, norm ratio",
    "toy": "the two-dimensional experiment: both sides of the inequality",
    "rates": "the tightest constants c_LION and c_SGD of the K^(-1/4) rate",
    "batches": "GPT-2: the norm ratio of 100, 1,000 and 5,000 batches",
    "scaling": "GPT-2 of several sizes: the exponent of the norm ratio against d",
}
RATE_SEEDS = (1, 2, 3)
TINY_PROBES = ("--probe.num_batches", "32")
"""The demo's 8 batches leave so much noise in r at tuned rates that nothing can be concluded from it."""
BATCHES = (100, 1000, 5000)
"""Batches of the probes that the paper states to be equivalent."""
QUICK_BATCHES = (4, 8, 16)
QUICK_FAMILY = ("--widths", "16,32,48,64", "--optimizers", "lion", "--seeds", "1", "--steps", "20",
                "--first-batches", "8", "--max-batches", "16")  # fmt: skip
BYTES_PER_TOKEN = {"trained": 3.3, "given": 4.5}
"""Of English, in the vocabulary that is trained here and in GPT-2's."""


@dataclass(frozen=True)
class Step:
    """One subcommand of a plan.

    Attributes:
        title: title for the log.
        verb: name of the subcommand, such as "pretrain".
        words: arguments.
        spread: whether it runs on several processes: those of this machine, or of all nodes if it is `launched`.
        launched: whether launch/torchrun.sh starts it, instead of this process.
        makes: the last file that it writes, if the step is needed only without that file; None if it always runs.
    """

    title: str
    verb: str
    words: tuple[str, ...]
    spread: bool = False
    launched: bool = False
    makes: Path | None = None

    def launch_words(self) -> list[str]:
        """The command of a `launched` step: launch/torchrun.sh with the config file first, as the script requires."""
        script = typed_path(shipped_folder("launch") / "torchrun.sh")
        place = self.words.index("--config")
        return ["bash", script, self.words[place + 1], *self.words[:place], *self.words[place + 2 :]]

    def shown(self, processes: int) -> str:
        """The command line that runs the step, to be pasted in a shell."""
        if self.launched:
            return shell_line(self.launch_words())
        return shown_job(self.verb, list(self.words), processes if self.spread else 1)


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
    if artefact == "scaling":
        return _scaling(scale, sources)
    if scale == "full":
        return _full(artefact, sources)
    if artefact == "batches":
        return _tiny_batches(sources)
    return _tiny_rates(sources) if artefact == "rates" else _tiny(artefact, sources)


def data_folder(kind: str, output: Path) -> Path:
    """Folder of the token files for a kind of model."""
    return output / f"data-{kind}"


def data_steps(kind: str, sources: Sources, *, held_out: bool = False) -> list[Step]:
    """The steps from text to token files, with the text and the vocabulary that were not given.

    Args:
        kind: "gpt2" or "bert".
        sources: the inputs given.
        held_out: whether the runs are evaluated on the demo's held-out text.
    """
    return [*_missing_sources(kind, sources, held_out=held_out), _prepare(kind, sources)]


def _missing_sources(kind: str, sources: Sources, *, held_out: bool) -> list[Step]:
    """The steps that make the text and the vocabulary that were not given."""
    text = sources.output / "text"
    steps = []
    if not sources.text or held_out:
        corpus = ("--only-corpus", "--output", str(text))
        steps.append(Step("text: the documentation of this Python", "demo", corpus, makes=text / "held_out.txt"))
    folder, form, last = {"gpt2": ("bpe", "bpe", "merges.txt"), "bert": ("wordpiece", "wordpiece", "vocab.txt")}[kind]
    if (sources.tokenizer if kind == "gpt2" else sources.vocab) is None:
        made = sources.output / folder
        words = ("train", "--input", *_text_files(sources), "--vocab-size", str(VOCAB_SIZE), "--output", str(made),
                 "--kind", form)  # fmt: skip
        steps.append(Step(f"{kind}: a vocabulary of {VOCAB_SIZE:,} tokens", "tokenizer", words, makes=made / last))
    return steps


def _text_files(sources: Sources) -> tuple[str, ...]:
    return sources.text or (str(sources.output / "text" / "train.jsonl"),)


def _prepare(kind: str, sources: Sources) -> Step:
    """The step from text to tokens."""
    output = sources.output
    tokenizer = (
        (sources.tokenizer or str(output / "bpe")) if kind == "gpt2" else (sources.vocab or str(output / "wordpiece"))
    )
    task = () if kind == "gpt2" else ("--task", "bert")
    split = () if sources.text and not sources.is_small else ("--split", SPLIT)
    words = (
        "--input",
        *_text_files(sources),
        "--tokenizer",
        tokenizer,
        "--output",
        str(data_folder(kind, output)),
        *task,
        *split,
    )
    return Step(f"{kind}: text to tokens", "prepare", words)


def _pretrain(
    config: Path, run_dir: Path, kind: str, recipe: Recipe, sources: Sources, *more: str, launched: bool = False
) -> Step:
    words = ["--config", typed_path(config), "--run_dir", str(run_dir), "--data.path", list_of_one(data_folder(kind, sources.output)),
             *recipe.words(), *more]  # fmt: skip
    if not launched:
        words += ["--data.cache", str(sources.output / "cache"), *(quick_words() if sources.quick else [])]
    title = f"{run_dir.name}: {OPTIMIZER_NAMES[recipe.optimizer]} at {recipe.lr:g}"
    return Step(title, "pretrain", tuple(words), spread=True, launched=launched)


def _evaluate(run_dir: Path, sources: Sources, *more: str) -> Step:
    held_out = str(sources.output / "text" / "held_out.txt")
    text = ("--wikitext103", sources.wikitext103, "--pages", "false") if sources.wikitext103 else ("--text", held_out)
    return Step(
        f"{run_dir.name}: zero-shot perplexity", "evaluate", (str(run_dir), "--steps", "all", *text, *more), spread=True
    )


def _compare(runs: list[Path], folder: Path) -> Step:
    return Step("tables and figures", "compare", (*map(str, runs), "--output", str(folder)))


def tiny_config(artefact: str) -> Path:
    """The config of an artefact's runs at the tiny scale."""
    return shipped_folder("configs") / ("bert_demo.yaml" if artefact == "figure-2" else "demo.yaml")


def _tiny(artefact: str, sources: Sources) -> Plan:
    """One small model at the paper's rates and at tuned ones; table-b1 and figure-3 share their runs."""
    kind = "bert" if artefact == "figure-2" else "gpt2"
    evaluates = artefact == "table-b1"
    held_out = evaluates and sources.wikitext103 is None
    steps = data_steps(kind, sources, held_out=held_out)
    paper: dict[str, Path] = {}
    tuned: dict[str, Path] = {}
    for found, recipes, mark in ((paper, PAPER, "-paper-rate"), (tuned, TUNED[kind], "")):
        for recipe in recipes:
            run_dir = sources.output / "runs" / f"{kind}-{recipe.optimizer}{mark}"
            found[f"{kind}/{recipe.optimizer}"] = run_dir
            steps.append(_pretrain(tiny_config(artefact), run_dir, kind, recipe, sources, *TINY_PROBES))
    runs = [*paper.values(), *tuned.values()]
    if evaluates:
        # Windows overlap as in the paper's convention. The first 30,000 tokens are enough for a small model.
        some = ("--max-tokens", "2000" if sources.quick else "30000")
        steps += [_evaluate(run_dir, sources, *some) for run_dir in runs]
    folder = sources.output / f"comparison-{artefact}"
    return Plan(artefact, "tiny", kind, (*steps, _compare(runs, folder)), paper, tuned, comparison=folder)


def _tiny_rates(sources: Sources) -> Plan:
    """LION and SGD with three seeds each, probed every 8 steps, since the constants are maxima over K."""
    steps = data_steps("gpt2", sources)
    seeds: dict[str, list[Path]] = {}
    often = ("--train.steps", "160", "--checkpoint.at_steps", "[]", "--probe.every", "8", "--probe.num_batches", "4",
             "--train.test_every", "0")  # fmt: skip
    config = tiny_config("rates")
    for recipe in TUNED["gpt2"][:2]:
        seeds[recipe.optimizer] = [
            sources.output / "runs" / f"rates-{recipe.optimizer}-seed{seed}" for seed in RATE_SEEDS
        ]
        steps += [
            _pretrain(config, run_dir, "gpt2", recipe, sources, *often, "--seed", str(seed))
            for run_dir, seed in zip(seeds[recipe.optimizer], RATE_SEEDS, strict=True)
        ]
    return Plan("rates", "tiny", "gpt2", tuple(steps), seeds=seeds)


def _tiny_batches(sources: Sources) -> Plan:
    """LION and SGD at tuned rates, and three probes of the last checkpoint; no probe reads a sample twice."""
    steps = data_steps("gpt2", sources)
    length = sample_length(sources)
    config = tiny_config("batches")
    train = load_config(config).train
    # As many training tokens as the other artefacts have.
    number = train.steps * load_config(config).model.seq_length // length
    words = ("--model.seq_length", str(length), "--train.steps", str(number), "--checkpoint.at_steps", f"[{number}]",
             "--probe.every", "0", "--train.test_every", "0")  # fmt: skip
    runs = {}
    for recipe in TUNED["gpt2"][:2]:
        run_dir = runs[f"gpt2/{recipe.optimizer}"] = sources.output / "runs" / f"batches-{recipe.optimizer}"
        steps.append(_pretrain(config, run_dir, "gpt2", recipe, sources, *words))
        steps += _probes(run_dir, QUICK_BATCHES if sources.quick else BATCHES)
    return Plan("batches", "tiny", "gpt2", tuple(steps), tuned_runs=runs)


def _probes(run_dir: Path, numbers: tuple[int, ...]) -> list[Step]:
    """Probes of a run's last checkpoint, of each number of batches."""
    return [
        Step(
            f"{run_dir.name}: {number:,} batches",
            "probe",
            (str(run_dir), "--steps", "latest", "--num-batches", str(number)),
            spread=True,
        )
        for number in numbers
    ]


def sample_length(sources: Sources) -> int:
    """The longest sample, in tokens, of which the training text has enough for the largest probe of `batches`.

    The text's tokens are estimated from its bytes as stored; `prepare` counts them later.

    Raises:
        ConfigError: the text is too short.
        DataError: a file of the text does not exist.
    """
    needed = BATCHES[-1] * load_config(tiny_config("batches")).train.global_batch_size
    size = sum(file.bytes for file in find_inputs(sources.text)) if sources.text else MAX_TRAIN_BYTES
    per_token = BYTES_PER_TOKEN["trained" if sources.tokenizer is None else "given"]
    tokens = size / per_token * float(SPLIT.split(",")[0]) / 100
    for length in (128, 64, 32, 16):
        if needed * length <= tokens:
            return length
    raise ConfigError(
        f"reproduce batches: needs {needed:,} different samples, about {needed * 16 * per_token / 0.94 / 1e6:.1f} MB of text, and "
        f"--text has {size / 1e6:.1f} MB; give a larger text"
    )


def _scaling(scale: Scale, sources: Sources) -> Plan:
    """The family of the verb `scaling`, in a folder of its own; the full scale is planned by that verb, not started."""
    if scale == "full" and (not sources.text or sources.tokenizer is None):
        raise ConfigError(
            "reproduce scaling --scale full: needs --text and --tokenizer: it has no substitutes for them"
        )
    words = ["--output", str(sources.output / "scaling"), "--scale", scale, "--processes", str(sources.processes)]
    words += ["--text", *sources.text] if sources.text else []
    words += ["--tokenizer", sources.tokenizer] if sources.tokenizer is not None else []
    words += QUICK_FAMILY if sources.quick else ()
    return Plan("scaling", scale, "", (Step("a family of models of different d", "scaling", tuple(words)),))


_FULL = {
    "table-b1": ("gpt2", ("gpt2_small", "gpt2_medium")),
    "figure-3": ("gpt2", ("gpt2_small", "gpt2_medium")),
    "figure-2": ("bert", ("bert_small", "bert_base")),
    "rates": ("gpt2", ("gpt2_small",)),
    "batches": ("gpt2", ("gpt2_small", "gpt2_medium")),
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
    if artefact == "batches":
        steps += [step for run_dir in paper.values() for step in _probes(run_dir, BATCHES)]
        return Plan(artefact, "full", kind, tuple(steps), paper)
    if artefact == "rates":
        return Plan(artefact, "full", kind, tuple(steps), seeds=seeds)
    folder = sources.output / f"comparison-{artefact}"
    return Plan(artefact, "full", kind, (*steps, _compare(list(paper.values()), folder)), paper, comparison=folder)
