"""`pretrain --text`: a tokenizer, a dataset and settings made from one's own text, in RUN.text beside the run.

The same command resumes. It finds the tokenizer and the dataset, and checks that they were made from the same text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_lion.config import ModelConfig, RunConfig
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.jobs import shell_line
from megatron_lion.prepare.find_files import InputFile, find_inputs
from megatron_lion.prepare.splits import auto_split
from megatron_lion.shipped import config_file
from megatron_lion.streams import say

DEFAULT_CONFIG = "gpt2-tiny"
MIN_BYTES = 10_000
"""A smaller text is refused: nothing can be learnt from it, and its held-out parts are shorter than one sample."""

_TASKS: dict[str, Literal["gpt", "bert"]] = {"gpt2": "gpt", "bert": "bert"}
_MANY_FILES, _HEAD_BYTES, _CHECKED_BYTES = 100, 4096, 1 << 20
_PASSES, _MIN_STEPS, _MAX_STEPS, _BATCH, _SEQ_LENGTH = 10, 300, 4000, 8, 128
_ENOUGH_STEPS = 200
"""A shorter run has a shorter warm-up than the 20 steps of the config, a tenth of its steps."""
_BYTES_PER_TOKEN = {512: 2.1, 1024: 2.6, 2048: 3.3, 4096: 3.5, 8192: 4.0}
"""Of English, by size of the vocabulary; measured on Wikipedia articles and a novel."""


@dataclass(frozen=True)
class OwnText:
    """The text of --text.

    Attributes:
        inputs: files, folders and patterns as given.
        files: the files they name.
        text_bytes: size of their text in bytes of UTF-8.
    """

    inputs: Sequence[str]
    files: Sequence[InputFile]
    text_bytes: int

    @property
    def vocab_size(self) -> int:
        """Number of ids to train: a power of two, from 512 for less than 0.4 MB of text to 8,192 for 3 MB or more."""
        return min(max(1 << (self.text_bytes // 350).bit_length() - 1, 512), 8192)

    @property
    def train_tokens(self) -> float:
        """Estimate of the number of training tokens."""
        return auto_split(self.text_bytes)[0] / 100 * self.text_bytes / _BYTES_PER_TOKEN[self.vocab_size]

    @property
    def divide_documents(self) -> Any:
        """Value of `PrepareOptions.divide_documents`: a few books are divided by position, many notes are not."""
        few = len(self.files) < _MANY_FILES and all(file.format == "txt" for file in self.files)
        return "always" if few else "auto"


def open_text(inputs: Sequence[str], world_size: int) -> OwnText:
    """Finds the files of --text and measures them.

    Args:
        inputs: files, folders or glob patterns.
        world_size: number of processes of the job.

    Raises:
        ConfigError: the job has several processes.
        DataError: a file is missing, damaged or of an unknown kind, or the text is too short.
    """
    from megatron_lion.prepare.few_documents import total_text_bytes
    from megatron_lion.prepare.pieces import ReadOptions

    files = find_inputs(inputs)
    text_bytes = total_text_bytes(files, ReadOptions())
    if text_bytes < MIN_BYTES:
        field = (
            "" if files[0].format in ("txt", "tar") else "; text is read from the field or column 'text' of each row"
        )
        raise DataError(
            f"--text {files[0].path}: {text_bytes:,} bytes of text are too few to train on; give at least {MIN_BYTES:,}, better "
            f"1,000,000{field}"
        )
    _check_encoding(files)
    text = OwnText(inputs, files, text_bytes)
    if world_size > 1:
        train, prepare = _commands(text)
        raise ConfigError(
            f"--text: prepares the text in one process, and this job has {world_size}; run `{train}` and `{prepare}` first, then give "
            "--data.path data/my instead of --text"
        )
    return text


def _check_encoding(files: Sequence[Any]) -> None:
    """Reads the beginning of each plain text, because the preparation would find a wrong encoding after minutes.

    Raises:
        DataError: the beginning is not UTF-8.
    """
    from megatron_lion.prepare.inputs import opened

    for file in files:
        if file.format != "txt":
            continue
        with opened(file) as (stream, _):
            beginning = stream.read(_CHECKED_BYTES)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(beginning)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path}: not UTF-8 at byte {error.start + 1}; iconv -f LATIN1 -t UTF-8 FILE > NEW.txt converts a text from "
                "another encoding"
            ) from None


def config_note(config: RunConfig) -> str | None:
    """Returns a note if the config of a text has no settings of the model, which then is the large one of the defaults."""
    if replace(config.model, vocab_size=None) != ModelConfig():
        return None
    return (
        f"note: the config has no model settings, so the model is {config.label} with {config.train.global_batch_size} samples a "
        f"step; for a small one, add the lines of `megatron-lion configs show {DEFAULT_CONFIG}`, or give flags instead of the config"
    )


def default_words(text: OwnText, words: Sequence[str]) -> list[str]:
    """Returns the words of `pretrain --text` with the default settings for this text in front.

    The defaults are a tiny GPT-2 and as many steps as read the text ten times, at most 4,000. With --config in the words,
    none are added.

    Args:
        text: from `open_text`.
        words: the words of the command line.
    """
    if any(word == "--config" or word.startswith("--config=") for word in words):
        return list(words)
    settings = {"run_dir": f"runs/{_stem(text)}", "name": "gpt2-own-text", **_settings(text, words)}
    added = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return ["--config", str(config_file(DEFAULT_CONFIG)), *added, *words]


def _settings(text: OwnText, words: Sequence[str]) -> dict[str, str]:
    tokens = text.train_tokens
    steps = round(_PASSES * tokens / (_BATCH * _SEQ_LENGTH) / 100) * 100
    steps = min(max(steps, _MIN_STEPS), _MAX_STEPS)
    every = str(steps // 10)
    short = _short_warmup(words)
    return {
        "train.steps": str(steps), "train.global_batch_size": str(_BATCH), "train.micro_batch_size": str(_BATCH),
        "train.test_every": every, "checkpoint.every": every, "checkpoint.at_steps": "[]", "probe.every": "0",
        **({} if short is None else {"schedule.warmup_steps": str(short)}),
    }  # fmt: skip


def _short_warmup(words: Sequence[str]) -> int | None:
    """Returns the warm-up steps of a run whose --train.steps are too few for those of the config, or None."""
    parts = [part for word in words for part in word.split("=", 1)]
    given = [parts[n + 1] for n, part in enumerate(parts[:-1]) if part == "--train.steps"]
    if not given or not given[-1].isdecimal() or any(part.startswith("--schedule.") for part in parts):
        return None
    return max(1, int(given[-1]) // 10) if int(given[-1]) < _ENOUGH_STEPS else None


def _stem(text: OwnText) -> str:
    """Returns the name of the first input without endings, for the name of the run's folder."""
    name = Path(text.inputs[0]).expanduser().resolve().name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "own-text"


def settings_line(text: OwnText, words: Sequence[str]) -> str | None:
    """Returns one line about the default settings that no flag replaces, or None if the words name a config."""
    if default_words(text, words) == list(words):
        return None
    given = {word.partition("=")[0] for word in words}
    used = [(f"--{key}", value) for key, value in _settings(text, words).items() if f"--{key}" not in given]
    return f"settings: {DEFAULT_CONFIG} with {shell_line([word for pair in used for word in pair])}; flags and --config replace them"


def text_folder(config: RunConfig) -> Path:
    """Returns the folder of the tokenizer and the dataset: RUN.text."""
    run_dir = Path(config.run_dir)
    if run_dir.name in ("", ".."):
        run_dir = run_dir.resolve()
    return run_dir.with_name(f"{run_dir.name}.text")


def data_folder(config: RunConfig) -> Path:
    """Returns the dataset folder, RUN.text/data."""
    return text_folder(config) / "data"


def with_data(config: RunConfig) -> RunConfig:
    """Returns the config with the text's dataset as data.path.

    Raises:
        ConfigError: the config has a data.path already.
    """
    if config.data.path:
        raise ConfigError(
            f"--text and data.path {', '.join(config.data.path)}: give one of them; remove --text if the dataset is that of the text"
        )
    return replace(config, data=replace(config.data, path=[str(data_folder(config))]))


def without_data(config: RunConfig, text: OwnText) -> RunConfig:
    """Returns the config with the size of the vocabulary that will be trained, for a preview before there is a dataset."""
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or text.vocab_size))


def preview(config: RunConfig, text: OwnText, *, prepared: bool) -> str:
    """Returns the line of --dry-run about the text."""
    done = "prepared in" if prepared else f"will be prepared, with a vocabulary of {text.vocab_size:,} or less, in"
    return f"text         {_names(text)}: {text.text_bytes:,} bytes; {done} {text_folder(config)}\n"


def data_preview(config: RunConfig, text: OwnText) -> str:
    """Returns the line of --dry-run about the data of a text that is not prepared."""
    passes = config.train.steps * config.train.global_batch_size * config.model.seq_length / text.train_tokens
    return f"about {text.train_tokens:,.0f} training tokens of the text, read {passes:,.1f} times (estimated)"


def is_prepared(config: RunConfig, text: OwnText, *, fresh: bool = False) -> bool:
    """Whether the dataset of this text is there.

    Args:
        config: the run's settings, without data.path.
        text: from `open_text`.
        fresh: whether the dataset of another text may be replaced.

    Raises:
        ConfigError: the dataset was made from another text, or for another kind of model, and `fresh` is false.
        DataError: the dataset is damaged.
    """
    from megatron_lion.data.manifest import NAME, read_manifest
    from megatron_lion.files import sha256_file
    from megatron_lion.prepare.inputs import reading

    folder = data_folder(config)
    if not (folder / NAME).exists():
        return False
    manifest = read_manifest(folder)
    again = "give another --run_dir for a new run, or --fresh to start over"
    if manifest.kind != _TASKS[config.model.kind]:
        if fresh:
            return False
        raise ConfigError(f"{folder}: was made for {manifest.kind}, but model.kind is {config.model.kind}; {again}")
    hashes = []
    for file in text.files:
        with reading(file.path):
            hashes.append(sha256_file(file.path))
    if [source.sha256 for source in manifest.sources] == hashes:
        return True
    if fresh:
        return False
    before = {source.sha256 for source in manifest.sources}
    changed = [str(file.path) for file, digest in zip(text.files, hashes, strict=True) if digest not in before]
    named = {source.path for source in manifest.sources}
    what = f"{changed[0]} {'changed' if changed[0] in named else 'is new'}" if changed else "the files are others"
    raise ConfigError(
        f"--text: {what} since {folder} was made, so this run cannot be continued; restore the text, {again} with the present one"
    )


def prepare_text(config: RunConfig, text: OwnText) -> None:
    """Trains a tokenizer on the text and prepares the dataset; both replace earlier ones in the text's folder.

    Raises:
        DataError: the text cannot be read, or has no words.
        StorageError: the folder cannot be written.
        BusyError: another process is writing the run, or is preparing its text.
    """
    from megatron_lion.logs import messages_on_stderr
    from megatron_lion.prepare.options import PrepareOptions
    from megatron_lion.prepare.pipeline import prepare
    from megatron_lion.prepare.progress import ConsoleProgress
    from megatron_lion.prepare.train_tokenizer import TrainOptions, train_tokenizer
    from megatron_lion.runs.folder import locked

    folder, task = text_folder(config), _TASKS[config.model.kind]
    say(f"preparing {_names(text)} ({text.text_bytes:,} bytes of text) in {folder}")
    # A run that is training reads the dataset that would be replaced.
    with locked(Path(config.run_dir)), messages_on_stderr(), ConsoleProgress() as progress:
        tokenizer = train_tokenizer(
            TrainOptions(
                inputs=text.inputs, vocab_size=text.vocab_size, output=folder / "tokenizer",
                kind="wordpiece" if task == "bert" else "bpe", at_most=True, overwrite=True,
            ), progress,
        )  # fmt: skip
        manifest = prepare(
            PrepareOptions(
                inputs=text.inputs, tokenizer=tokenizer, output=data_folder(config), task=task,
                divide_documents=text.divide_documents, overwrite=True,
            ), progress=progress,
        )  # fmt: skip
    sizes = ", ".join(f"{split.tokens:,} {name}" for name, split in manifest.splits.items())
    say(f"{manifest.tokenizer.vocab_size:,} ids, tokens: {sizes}")


def sample_command(config: RunConfig, text: OwnText) -> str:
    """Returns the command that shows what the run has learnt: samples of GPT-2, or the words that BERT fills in."""
    if config.model.kind == "bert":
        return shell_line(["megatron-lion", "evaluate", config.run_dir, "--fill-mask", "It was a [MASK] day."])
    words = ["megatron-lion", "generate", config.run_dir, "--prompt", _first_words(text), "--max-new-tokens", "100"]
    return shell_line(words)


def _first_words(text: OwnText) -> str:
    """Returns four words of the first line of prose."""
    from megatron_lion.prepare.inputs import opened
    from megatron_lion.prepare.pieces import ReadCount, ReadOptions, read_files

    if text.files[0].format == "txt":
        with opened(text.files[0]) as (stream, _):
            beginning = stream.read(_HEAD_BYTES).decode("utf-8", errors="ignore").removeprefix("\ufeff")
    else:
        beginning = next(read_files(text.files[:1], ReadOptions(), ReadCount()), "")[:_HEAD_BYTES]
    lines = (line.split() for line in beginning.splitlines())
    return " ".join(next((words for words in lines if len(words) >= 5), ["The"])[:4]).strip("\"'“”‘’«»„()[]#*_ ")


def _names(text: OwnText) -> str:
    more = f" and {len(text.files) - 1} more files" if len(text.files) > 1 else ""
    return f"{text.files[0].path}{more}"


def _commands(text: OwnText) -> tuple[str, str]:
    """Returns the commands that train a tokenizer and prepare the text for a job of several processes."""
    words, folder = ["--input", *text.inputs], "data/my-tokenizer"
    train = ["tokenizer", "train", *words, "--vocab-size", str(text.vocab_size), "--output", folder]
    prepare = ["prepare", *words, "--tokenizer", folder, "--output", "data/my"]
    if text.divide_documents != "auto":
        prepare += ["--divide-documents", text.divide_documents]
    return shell_line(["megatron-lion", *train]), shell_line(["megatron-lion", *prepare])


@contextmanager
def advice_for_texts() -> Iterator[None]:
    """Replaces the advice of an error that names a flag of `prepare`, because `pretrain --text` does not have it."""
    from megatron_lion.errors import DataError
    from megatron_lion.prepare.find_files import FORMAT_ADVICE
    from megatron_lion.prepare.pieces import SKIP_ADVICE

    skip = re.escape(SKIP_ADVICE).replace(re.escape("{unit}"), r"\w+")
    try:
        yield
    except DataError as error:
        text = str(error).replace(FORMAT_ADVICE, "; rename it if it is one of these")
        encoding = "; iconv -f LATIN1 -t UTF-8 FILE > NEW.txt converts a file from another encoding"
        error.args = (re.sub(skip, encoding if "UTF-8" in text else "", text),)
        raise
