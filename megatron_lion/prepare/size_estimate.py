"""Estimates the tokens, disk space and time of a preparation from a small sample of the corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.prepare.encode_piece import EncodeSettings
from megatron_lion.prepare.encoders import Encoder
from megatron_lion.prepare.find_files import TABLES, InputFile
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BadLine
from megatron_lion.prepare.long_texts import text_parts
from megatron_lion.prepare.pieces import Piece, ReadCount, cut_pieces, read_piece
from megatron_lion.prepare.tables import column_bytes

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 18
_GROWTH_BYTES = 1 << 23
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
    """Encodes the first 256 KiB of the largest file and scales the result to the corpus.

    Args:
        files: input files, at least one.
        settings: settings of the workers.
        encoder: from `build_encoder`.

    Raises:
        DataError: the largest file is damaged at its beginning.
    """
    file = max(files, key=lambda candidate: candidate.bytes)
    piece = next(cut_pieces(file, _SAMPLE_BYTES, settings.read.json_key), None)
    if piece is None:
        return Estimate(0.0, _FIXED_BYTES, 0.0)
    # Twice: the first time, packages are loaded and the encoder learns its words.
    for _ in range(2):
        began = time.monotonic()
        texts, text_bytes = _sample(file, piece, settings)
        encoded = encoder.encode_documents(texts)
        for text in texts:
            hashlib.sha256(text)
        seconds = time.monotonic() - began
    num_tokens = sum(document.ids.size for document in encoded) + len(texts)
    sample_bytes = max(sum(map(len, texts)), 1)
    growth = 1.0
    if file.format in TABLES:
        growth = column_bytes(file, settings.read.json_key) / file.bytes
    elif piece.data is not None:
        growth = _growth(file, settings.read.json_key)
    elif file.format == "tar":
        growth = text_bytes / max(piece.stored_bytes, 1)
    elif file.compression:
        growth = USUAL_COMPRESSION
    scale = sum(each.bytes for each in files) * growth / sample_bytes
    tokens, documents = num_tokens * scale, len(texts) * scale
    sentences = sum(document.lengths.size for document in encoded) * scale
    # Tokens are stored in shards and merged; documents and sentences in shards (28 and 4 bytes), in the index (20 and 12) and
    # in its temporary files (12 and 4). 10 % more for the rest of the text.
    peak = 1.1 * (2 * tokens * token_dtype(settings.vocab_size).itemsize + 60 * documents + 20 * sentences)
    return Estimate(tokens, int(peak) + _FIXED_BYTES, seconds * scale)


def _growth(file: InputFile, key: str) -> float:
    """Returns the decompressed bytes for each stored one, of compressed JSON lines."""
    size = stored = 0
    for piece in cut_pieces(file, _SAMPLE_BYTES, key):
        size += len(piece.data or b"")
        stored += piece.stored_bytes
        # A decompressor reads up to 1 MiB ahead, more than the first pieces need.
        if stored >= _GROWTH_BYTES:
            break
    return size / max(stored, 1)


def _sample(file: InputFile, piece: Piece, settings: EncodeSettings) -> tuple[list[bytes], int]:
    """Returns the first texts of a piece in UTF-8, cut to the sample's size, and the bytes of all text that was read."""
    texts: list[bytes] = []
    characters = text_bytes = 0
    # The estimate skips bad lines; the preparation itself reports them with their line numbers.
    lenient = dataclasses.replace(settings.read, on_error="skip")
    for text in _texts(piece, dataclasses.replace(settings, read=lenient)):
        if characters < _SAMPLE_BYTES:
            beginning = text[:_SAMPLE_BYTES]
            texts.append(beginning.encode("utf-8"))
            characters += len(beginning)
        text_bytes += len(text.encode("utf-8"))
        # Of an archive, all of the piece is read, to know how much text its stored bytes give.
        if characters >= _SAMPLE_BYTES and file.format != "tar":
            break
    return texts, text_bytes


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
