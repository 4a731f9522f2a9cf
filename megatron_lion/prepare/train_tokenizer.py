"""Trains a tokenizer on the files of a corpus, and keeps a different one that is in the output folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import storage_errors
from megatron_lion.prepare.find_files import InputFile, survey
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BadLine
from megatron_lion.prepare.long_texts import cut_text, text_parts
from megatron_lion.prepare.pieces import OnError, ReadCount, ReadOptions, problem_message, read_files
from megatron_lion.prepare.progress import NoProgress, Progress
from megatron_lion.prepare.vocabularies import Kind, bpe_files, check_size, wordpiece_files, write_vocabulary

logger = logging.getLogger(__name__)

FILES = {"bpe": ("vocab.json", "merges.txt"), "wordpiece": ("vocab.txt",)}
"""Names of the files of each kind of tokenizer."""
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Input, output and settings of the training of a tokenizer.

    Attributes:
        inputs: files, folders and glob patterns, as for `prepare`.
        vocab_size: number of ids, with special tokens.
        output: folder to make.
        kind: "bpe" (GPT-2's byte-level BPE: vocab.json, merges.txt) or "wordpiece" (BERT's, uncased: vocab.txt).
        json_key: key (JSON) or column (Parquet, Arrow) of the text.
        format: "auto" for the format of each file's ending, or "jsonl", "txt", "parquet", "arrow", "tar".
        on_error: "stop" at the first bad line, or "skip" bad lines; of a bad .txt file, only the rest is skipped.
        at_most: whether a text with too few pairs for `vocab_size` gives a smaller vocabulary; otherwise it is an error.
        overwrite: whether another tokenizer in the folder is replaced.
    """

    inputs: Sequence[str | Path]
    vocab_size: int
    output: str | Path
    kind: Kind = "bpe"
    json_key: str = "text"
    format: str = "auto"
    on_error: OnError = "stop"
    at_most: bool = False
    overwrite: bool = False


def train_tokenizer(options: TrainOptions, progress: Progress | None = None) -> Tokenizer:
    """Trains a tokenizer and writes its files, or finds the same files in the output folder.

    The same text gives the same files, at any number of threads.

    Args:
        options: input, output and settings.
        progress: receives the number of bytes read; None reports nothing.

    Returns:
        The tokenizer, loaded from the output folder.

    Raises:
        ConfigError: the size is too small, or the folder holds other files and `overwrite` is false.
        DataError: an input is missing, damaged or has a bad line; there is no text, or too little for the size.
        StorageError: the folder cannot be read or written.
    """
    check_size(options.kind, options.vocab_size)
    output = Path(options.output).expanduser()
    existing = _existing(output, options.kind)
    different = ConfigError(
        f"{output}: contains another tokenizer; choose another --output, or replace it with --overwrite"
    )
    keeps = bool(existing) and not options.overwrite
    # Known before the text is read: a whole tokenizer of another size.
    if (
        keeps
        and not options.at_most
        and len(existing) == len(FILES[options.kind])
        and _size(existing) != options.vocab_size
    ):
        raise different
    found = survey(options.inputs, options.format)
    for note in found.notes():
        logger.info("%s", note)
    where = str(found.files[0].path) + (f" and {len(found.files) - 1} more" if len(found.files) > 1 else "")
    train = bpe_files if options.kind == "bpe" else wordpiece_files
    made = train(_texts(found.files, options, progress or NoProgress()), options.vocab_size, where)
    size = _size(made)
    if size < options.vocab_size and not options.at_most:
        raise DataError(
            f"vocab_size {options.vocab_size}: the text gives at most {size:,} ids, with each of its words as one; give at most {size}, "
            "or more text"
        )
    if keeps and any(made[name] != content for name, content in existing.items()):
        raise different
    return write_vocabulary(made, output)


def _existing(output: Path, kind: Kind) -> dict[str, bytes]:
    """Returns the tokenizer files in the output folder, by name.

    Raises:
        ConfigError: the output is a file, or a folder with other files.
        StorageError: a file cannot be read.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output}: exists and is not a folder; choose another --output")
    with storage_errors(output, "read"):
        names = sorted(path.name for path in output.glob("[!.]*"))  # without a killed run's temporary files
        if other := next((name for name in names if name not in FILES[kind]), None):
            raise ConfigError(
                f"{output}: contains {other}, which is no file of a {kind} tokenizer; choose another --output"
            )
        return {name: (output / name).read_bytes() for name in names}


def _size(files: Mapping[str, bytes]) -> int:
    """Returns the number of ids; 0 for a damaged vocab.json."""
    if "vocab.json" in files:
        try:
            return len(json.loads(files["vocab.json"]))
        except ValueError:
            return 0
    return files["vocab.txt"].count(b"\n")


def _texts(files: Sequence[InputFile], options: TrainOptions, progress: Progress) -> Iterator[str]:
    """Yields the text of all files in parts that end at the end of a word; reports the stored bytes read."""
    progress.stage("reading the text", sum(file.bytes for file in files))
    read = ReadOptions(json_key=options.json_key, on_error=options.on_error)
    for file in files:
        if file.format == "txt":
            yield from _texts_of_txt(file, read, progress)
            continue
        for text in read_files(
            [file], read, ReadCount(), lambda piece: progress.advance(piece.stored_bytes), _PIECE_BYTES
        ):
            yield from cut_text(text)
    logger.info("the text is read; merging its most common pairs")


def _texts_of_txt(file: InputFile, read: ReadOptions, progress: Progress) -> Iterator[str]:
    done = 0
    try:
        with reading(file.path), opened(file) as (stream, stored):
            for text in text_parts(stream):
                yield text
                done, before = min(stored.tell(), file.bytes), done
                progress.advance(done - before)
    except BadLine as bad:
        if read.on_error == "stop":
            raise DataError(problem_message(file.path, 1, bad.what)) from None
    progress.advance(file.bytes - done)
