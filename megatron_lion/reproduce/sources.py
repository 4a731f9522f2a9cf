"""Text and vocabularies of a reproduction: the user's, or the demo corpus and vocabularies trained on the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import sha256_file, write_whole
from megatron_lion.reproduce.recipes import VOCAB_SIZE


@dataclass(frozen=True)
class Sources:
    """What a reproduction is made from.

    Attributes:
        text: training text, as for `prepare --input`; empty takes the demo's corpus.
        tokenizer: GPT-2's, as for `prepare`; None trains a byte-level BPE on the text.
        vocab: BERT's vocab.txt; None trains a WordPiece on the text.
        wikitext103: wiki.test.tokens; None takes the demo's held-out prose.
        output: folder for everything.
        processes: of one machine, for the tiny scale.
        quick: a few steps only.
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
        """Whether 0.05 % of the text would be too little for a test split: it is less than a gigabyte of files."""
        files = [Path(name) for name in self.text]
        return all(path.is_file() for path in files) and sum(path.stat().st_size for path in files) < 1e9


def check_sources(sources: Sources) -> None:
    """Refuses files that are not there, before anything runs.

    Raises:
        DataError: names the flag and the file.
    """
    named = [("--tokenizer", sources.tokenizer), ("--vocab", sources.vocab), ("--wikitext103", sources.wikitext103)]
    for flag, name in named:
        if name is not None and not name.startswith("hf:") and not Path(name).exists():
            raise DataError(f"{flag} {name}: no such file or folder")


def make_missing(sources: Sources, kind: str, say: Callable[[str], None]) -> None:
    """Makes the text and the vocabulary that were not given, where they are not there yet.

    Args:
        sources: what was given.
        kind: "gpt2" or "bert".
        say: told what is made.

    Raises:
        ConfigError: the folder holds what was made from other text.
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
    """Keeps vocabularies, data and runs of one text together: they would be taken for those of another."""
    found = "\n".join(sha256_file(Path(name)) if Path(name).is_file() else name for name in files) + "\n"
    record = output / "text.sha256"
    if record.is_file() and record.read_text(encoding="utf-8") != found:
        raise ConfigError(f"--output {output}: holds a reproduction from other text; choose another folder")
    write_whole(record, found.encode())
