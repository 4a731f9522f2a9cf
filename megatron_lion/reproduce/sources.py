"""Text and vocabularies of a reproduction: the user's, or the demo corpus and vocabularies trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import make_folder, sha256_file, write_whole


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


def note_text(sources: Sources) -> None:
    """Records the SHA-256 of the training text, so that vocabularies, data and runs of another text are never reused.

    Raises:
        ConfigError: the output folder contains a reproduction from other text.
    """
    output = sources.output
    files = list(sources.text) or [str(output / "text" / "train.jsonl")]
    found = "\n".join(sha256_file(Path(name)) if Path(name).is_file() else name for name in files) + "\n"
    record = output / "text.sha256"
    if record.is_file() and record.read_text(encoding="utf-8") != found:
        raise ConfigError(f"--output {output}: contains a reproduction from other text; choose another folder")
    make_folder(output)
    write_whole(record, found.encode())
