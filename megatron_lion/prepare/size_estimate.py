"""Estimates the tokens, disk space and time of a preparation from a small sample of the corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.prepare.encode_piece import EncodeSettings
from megatron_lion.prepare.encoders import Encoder
from megatron_lion.prepare.find_files import InputFile
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BadLine
from megatron_lion.prepare.long_texts import text_parts
from megatron_lion.prepare.pieces import Piece, ReadCount, cut_pieces, read_piece
from megatron_lion.prepare.tables import column_bytes

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 18
_READ_BYTES = 1 << 21
_MOST_BYTES = 1 << 26
# Used if the beginning of a compressed file does not show its ratio: English text shrinks to about a quarter.
USUAL_COMPRESSION = 4.0
_FIXED_BYTES = 1 << 22
_LONG_TEXT_BYTES = 1 << 25
_MEMORY_PER_BYTE = {"gpt": 122, "bert": 42}
"""Bytes of memory for each byte of a document, by task. Measured on 3 and 12 MB of WikiText-103 with the vocabularies
of GPT-2 (`tokenizers`, one call) and BERT (divided into sentences)."""


@dataclass(frozen=True)
class Estimate:
    """Expected size and cost of a preparation.

    Attributes:
        tokens: number of tokens of the whole corpus.
        disk_bytes: disk space in bytes at the peak, when both shards and merged files exist.
        core_seconds: time of reading, hashing and encoding on one core, in seconds.
    """

    tokens: float
    disk_bytes: int
    core_seconds: float


def estimate_work(files: Sequence[InputFile], settings: EncodeSettings, encoder: Encoder) -> Estimate:
    """Reads parts of the largest file, encodes 256 KiB of their text, and scales the result to the corpus.

    Args:
        files: input files, at least one.
        settings: settings of the workers.
        encoder: from `build_encoder`.

    Raises:
        DataError: the largest file is damaged at its beginning.
    """
    file = max(files, key=lambda candidate: candidate.bytes)
    sample = _text_sample(file, settings) if file.format == "txt" else _sample(file, settings)
    # Twice: the first time, the encoder learns its words.
    for _ in range(2):
        began = time.monotonic()
        encoded = encoder.encode_documents(sample.texts)
        for text in sample.texts:
            hashlib.sha256(text)
        seconds = time.monotonic() - began
    stored = sum(each.bytes for each in files)
    text_bytes, documents = stored * sample.text_share, stored * sample.document_share
    scale = text_bytes / max(sum(map(len, sample.texts)), 1)
    tokens = sum(document.ids.size for document in encoded) * scale + documents
    sentences = sum(document.lengths.size for document in encoded) * scale
    # Tokens are stored in shards and merged; documents and sentences in shards (28 and 4 bytes), in the index (20 and 12) and
    # in its temporary files (12 and 4). 10 % more for the rest of the text.
    peak = 1.1 * (2 * tokens * token_dtype(settings.vocab_size).itemsize + 60 * documents + 20 * sentences)
    return Estimate(tokens, int(peak) + _FIXED_BYTES, seconds * scale + stored * sample.read_seconds)


class _Sample(NamedTuple):
    """Some texts of a file in UTF-8, and what each of its stored bytes gives.

    Attributes:
        texts: texts of about `_SAMPLE_BYTES` together; the last one can be cut.
        text_share: bytes of text for each stored byte.
        document_share: documents for each stored byte.
        read_seconds: time of reading for each stored byte.
    """

    texts: list[bytes]
    text_share: float
    document_share: float
    read_seconds: float


def _sample(file: InputFile, settings: EncodeSettings) -> _Sample:
    """Reads the first pieces of a file, whole, until there is text and the share of text is known well enough."""
    texts: list[bytes] = []
    # The estimate skips bad lines; the preparation itself reports them with their line numbers.
    lenient = dataclasses.replace(settings.read, on_error="skip")
    read_ahead = file.compression or file.format == "tar"  # a decompressor reads up to 1 MiB more than the pieces need
    characters = text_bytes = documents = stored = first = 0
    began = time.monotonic()
    for piece in _spread(file, settings.read.json_key):
        enough = _READ_BYTES * (4 if read_ahead else 16 if piece.unit == "value" else 1)
        for text in read_piece(piece, lenient, ReadCount()):
            if characters < _SAMPLE_BYTES:
                beginning = text[:_SAMPLE_BYTES]
                texts.append(beginning.encode("utf-8"))
                characters += len(beginning)
            text_bytes += len(text.encode("utf-8"))
            documents += 1
        stored += piece.stored_bytes
        if (stored >= enough and characters >= _SAMPLE_BYTES) or stored >= _MOST_BYTES:
            break
        if not first:
            first, began = stored, time.monotonic()  # the first piece loads packages
    seconds = (time.monotonic() - began) / max(stored - first, _SAMPLE_BYTES)
    text_share = text_bytes / max(stored, 1)
    if file.format == "parquet" and text_bytes:  # its metadata are better than a part of the rows
        text_share = column_bytes(file, settings.read.json_key) / file.bytes or text_share
    return _Sample(texts, text_share, text_share * documents / max(text_bytes, 1), seconds)


def _spread(file: InputFile, key: str) -> Iterator[Piece]:
    """Yields the pieces of a file; of plain JSON lines, first some that are spread over it, since its parts may differ."""
    pieces = cut_pieces(file, _SAMPLE_BYTES, key)
    first = next(pieces, None)
    if first is None:
        return
    if file.format != "jsonl" or first.data is not None:
        yield from itertools.chain([first], pieces)
        return
    every = [first, *pieces]
    step = max(len(every) * _SAMPLE_BYTES // _READ_BYTES, 1)
    yield from every[::step]
    yield from (piece for piece in every if piece.number % step)


def _text_sample(file: InputFile, settings: EncodeSettings) -> _Sample:
    """Reads the beginning of a text file, which is one piece."""
    texts: list[bytes] = []
    characters = 0
    began = time.monotonic()
    piece = next(cut_pieces(file, _SAMPLE_BYTES))
    for text in _texts(piece, settings):
        texts.append(text[:_SAMPLE_BYTES].encode("utf-8"))
        characters += len(text)
        if characters >= _SAMPLE_BYTES:
            break
    size = sum(map(len, texts))
    share = USUAL_COMPRESSION if file.compression else 1.0
    in_parts = settings.reads_parts(piece) or settings.read.txt_documents == "file"
    documents = 1 / max(file.bytes, 1) if in_parts else len(texts) * share / max(size, 1)
    return _Sample(texts, share if size else 0.0, documents, (time.monotonic() - began) * share / max(size, 1))


def warn_of_memory(files: Sequence[InputFile], task: Literal["gpt", "bert"]) -> None:
    """Warns of large text files that are one document and are encoded at once instead of in parts (see `long_texts`)."""
    what = "this tokenizer encodes" if task == "gpt" else "is divided into sentences"
    for file in files:
        size = file.bytes * (USUAL_COMPRESSION if file.compression else 1)
        if file.format == "txt" and size >= _LONG_TEXT_BYTES:
            logger.warning(
                "%s: is one document of %s%.0f MB, which %s at once, in about %.1f GB of memory; give --txt-documents blank-line "
                "to divide it at blank lines",
                file.path, "about " if file.compression else "", size / 1e6, what, size * _MEMORY_PER_BYTE[task] / 1e9,
            )  # fmt: skip


def _texts(piece: Piece, settings: EncodeSettings) -> Iterator[str]:
    if not settings.reads_parts(piece):
        yield from read_piece(piece, settings.read, ReadCount())
        return
    with suppress(BadLine), reading(piece.file.path), opened(piece.file) as (stream, _):
        yield from text_parts(stream)
