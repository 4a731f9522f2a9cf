"""Text and vocabularies of a reproduction: the user's, or the demo corpus and vocabularies trained on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import sha256_file, write_whole
from megatron_lion.reproduce.recipes import VOCAB_SIZE


@dataclass(frozen=True)
class Sources:
    """The inputs of a reproduction.

    Attributes:
        text: training text, as for `prepare --input`; if empty, the demo's corpus.
        tokenizer: GPT-2's tokenizer, as for `prepare`; if None, a byte-level BPE is trained on the text.
        vocab: BERT's vocab.txt; if None, a WordPiece vocabulary is trained on the text.
        wikitext103: wiki.test.tokens; if None, the demo's held-out prose.
        output: folder for all files.
        processes: processes on one machine, for the tiny scale.
        quick: whether runs have only a few steps.
    """

    text: tuple[str, ...]
    tokenizer: str | None
    vocab: str | None
    wikitext103: str | None
    output: Path
    processes: int = 2
    quick: bool = False

    @property
    def is_small(self) -> bool:
        """Whether the text is less than a gigabyte of files: the default split of 0.05 % is then too small for a test."""
        files = [Path(name) for name in self.text]
        return all(path.is_file() for path in files) and sum(path.stat().st_size for path in files) < 1e9


def check_sources(sources: Sources) -> None:
    """Checks that all given files exist, before the first step.

    Raises:
        DataError: a file does not exist; the message names the flag and the file.
    """
    named = [("--tokenizer", sources.tokenizer), ("--vocab", sources.vocab), ("--wikitext103", sources.wikitext103)]
    for flag, name in named:
        if name is not None and not name.startswith("hf:") and not Path(name).exists():
            raise DataError(f"{flag} {name}: no such file or folder")


def make_missing(sources: Sources, kind: str, say: Callable[[str], None]) -> None:
    """Creates the text and the vocabulary that were not given and do not exist yet.

    Args:
        sources: the inputs given.
        kind: "gpt2" or "bert".
        say: called with a line on each file that is created.

    Raises:
        ConfigError: the output folder contains a reproduction from other text.
    """
    from megatron_lion.prepare.demo_corpus import build_demo_corpus
    from megatron_lion.prepare.vocabularies import train_bpe, train_wordpiece

    text = sources.output / "text"
    if not (text / "train.jsonl").is_file() or not (text / "held_out.txt").is_file():
        say("a corpus from this machine's Python documentation")
        build_demo_corpus(text)
    files = list(sources.text) or [str(text / "train.jsonl")]
    _note_text(sources.output, files)
    if kind == "gpt2" and sources.tokenizer is None and not (sources.output / "bpe" / "merges.txt").is_file():
        say(f"a byte-level BPE of {VOCAB_SIZE:,} tokens for the text")
        train_bpe(files, VOCAB_SIZE, sources.output / "bpe")
    if kind == "bert" and sources.vocab is None and not (sources.output / "wordpiece" / "vocab.txt").is_file():
        say(f"a WordPiece vocabulary of {VOCAB_SIZE:,} tokens for the text")
        train_wordpiece(files, VOCAB_SIZE, sources.output / "wordpiece")


def _note_text(output: Path, files: list[str]) -> None:
    """Records the text's SHA-256, so that vocabularies, data and runs of another text are never reused."""
    found = "\n".join(sha256_file(Path(name)) if Path(name).is_file() else name for name in files) + "\n"
    record = output / "text.sha256"
    if record.is_file() and record.read_text(encoding="utf-8") != found:
        raise ConfigError(f"--output {output}: contains a reproduction from other text; choose another folder")
    write_whole(record, found.encode())
