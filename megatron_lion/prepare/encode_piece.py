"""Encodes one piece of a corpus into a shard: its tokens, and each document's length, hash and size.

NAME.json of a shard is written last, and contains the SHA-256 of the shard's other files (`shards`). If it is readable
and they match, the shard is complete and a later run reuses it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors
from megatron_lion.prepare.encoders import Encoder
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BadLine
from megatron_lion.prepare.long_texts import text_parts
from megatron_lion.prepare.overlap import LongDocument, OverlapFinder, saved_finder
from megatron_lion.prepare.pieces import Piece, ReadCount, ReadOptions, read_piece
from megatron_lion.prepare.positions import WHOLE, Part, PartStream, divide_text, parts_of_file
from megatron_lion.prepare.sentences import SplitterName
from megatron_lion.prepare.shards import EncodedShard
from megatron_lion.prepare.splits import DocumentDigest

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of a worker, without the tokenizer.

    Attributes:
        read: how documents are read from files.
        eod_id: id that is appended to every document, or None.
        seed: seed of the documents' hashes.
        vocab_size: number of token ids; determines the dtype of the tokens.
        splitter: sentence splitter if documents are stored as sentences (BERT), else None.
        in_parts: whether a text file that is one document is encoded in parts (`long_texts.divides_at_blanks`).
        divide: shares of train, valid and test in percent by which each document is divided by position, or None.
        overlap: name of the file of 13-grams beside the shards' folder (`overlap.save_grams`), or None.
    """

    read: ReadOptions
    eod_id: int | None
    seed: int
    vocab_size: int
    splitter: SplitterName | None = None
    in_parts: bool = False
    divide: tuple[float, float, float] | None = None
    overlap: str | None = None

    def reads_parts(self, piece: Piece) -> bool:
        """Whether a piece is one text that is encoded in parts."""
        return self.in_parts and piece.file.format == "txt" and self.read.txt_documents == "file"


def encode_piece(piece: Piece, folder: Path, name: str, settings: EncodeSettings, encoder: Encoder) -> EncodedShard:
    """Reads, encodes and writes one piece.

    With on_error "stop", a bad line ends the piece: the returned shard lists it in `read.problems`, and no files of
    the shard are kept.

    Args:
        piece: piece to encode.
        folder: folder of the shards.
        name: name of the shard.
        settings: settings of the worker.
        encoder: from `build_encoder`.

    Raises:
        DataError: the input file is damaged.
        StorageError: the shard cannot be written.
    """
    tokens_path = folder / f"{name}.tokens"
    documents = _Documents(settings, saved_finder(folder.parent / settings.overlap) if settings.overlap else None)
    count, digest = ReadCount(), hashlib.sha256()
    if settings.reads_parts(piece):
        contents = documents.add_parts(piece, encoder, count)
    else:
        contents = (documents.add(batch, encoder, count) for batch in _batches(read_piece(piece, settings.read, count)))
    with storage_errors(tokens_path), open(tokens_path, "wb") as stream:
        for content in contents:
            digest.update(content)
            stream.write(content)
        if not documents:  # a text read in parts was not UTF-8, so its tokens belong to no document
            digest = hashlib.sha256()
            stream.truncate(0)
    shard = documents.shard(name, digest.hexdigest(), count)
    if settings.read.on_error == "stop" and count.problems:
        with storage_errors(tokens_path, "removed"):
            tokens_path.unlink()
        return shard
    # Nothing is synced: NAME.json has the hashes of the others and its own end, so a piece of which a power loss cut a file
    # short is encoded again.
    overlaps = {f"{name}.overlaps": documents.overlaps()} if shard.overlaps else {}
    last = json.dumps(dataclasses.asdict(shard)).encode()
    for file, data in {f"{name}.documents": documents.to_bytes(), **overlaps, f"{name}.json": last}.items():
        with storage_errors(folder / file), open(folder / file, "wb") as stream:
            stream.write(data)
    return shard


class _Record(NamedTuple):
    """Length in tokens, 128-bit hash, bytes and split of a document, or of a part of it."""

    length: int
    hash: bytes
    text_bytes: int
    split: int


class _Documents:
    """Collects lengths, hashes and sentence counts of a shard's documents, batch by batch."""

    def __init__(self, settings: EncodeSettings, finder: OverlapFinder | None) -> None:
        self._seed = settings.seed
        self._finder = finder
        self._overlaps: list[npt.NDArray[np.int32]] = []
        self._vocab_size, self._dtype = settings.vocab_size, token_dtype(settings.vocab_size)
        self._end = np.array([] if settings.eod_id is None else [settings.eod_id], dtype=self._dtype)
        self._by_sentences = settings.splitter is not None
        self._divide = settings.divide
        self._splits: list[int] = []
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        self._sentences: list[int] = []
        self._sentence_lengths: list[npt.NDArray[np.int32]] = []
        self._text_bytes: list[int] = []
        self._divided = 0

    def add(self, texts: Sequence[str], encoder: Encoder, count: ReadCount) -> bytes:
        """Encodes and records documents; returns the bytes of their tokens for NAME.tokens."""
        parts: list[npt.NDArray[Any]] = []
        first, recorded = len(self._lengths), []
        divided = list(self._with_splits(texts, count))
        contents = [utf8 for utf8, _ in divided]
        for (utf8, split), encoded in zip(divided, encoder.encode_documents(contents), strict=True):
            if self._by_sentences:
                if not encoded.lengths.size:  # a text of control characters alone has no token, so it is no document
                    count.skip("document without a token")
                    continue
                self._sentences.append(encoded.lengths.size)
                self._sentence_lengths.append(encoded.lengths)
                self._divided += encoded.divided
            digest = DocumentDigest(self._seed)
            digest.update(utf8)
            self._record(_Record(encoded.ids.size + self._end.size, digest.first_bytes(), len(utf8), split))
            parts += (encoded.ids, self._end)
            recorded.append(utf8)
        if self._finder is not None:
            self._overlaps.append(self._finder.find(recorded) + np.array([first, 0], dtype=np.int32))
        return self._content(np.concatenate(parts)) if parts else b""

    def _content(self, ids: npt.NDArray[Any]) -> bytes:
        """Returns ids in the dtype of the token files, which would make another id of one that is too large for it."""
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise DataError(
                f"the encoder gave id {ids.max()}, beyond the vocabulary of {self._vocab_size}; use --encoder tokenizers"
            )
        return ids.astype(self._dtype).tobytes()

    def _with_splits(self, texts: Sequence[str], count: ReadCount) -> Iterator[tuple[bytes, int]]:
        """Yields (UTF-8, split) of each document, or of each part of it if documents are divided by position."""
        for text in texts:
            for part, split in divide_text(text, self._divide) if self._divide else [(text, 0)]:
                if part.isspace():
                    count.skip("empty_document")
                else:
                    yield part.encode("utf-8"), split

    def __len__(self) -> int:
        return len(self._lengths)

    def add_parts(self, piece: Piece, encoder: Encoder, count: ReadCount) -> Iterator[bytes]:
        """Encodes and records a text file as one document, part by part; yields the bytes of its tokens.

        Its length and hash are those of the whole document, of which only one part is in memory at a time. If documents
        are divided by position, this holds for each of its parts.

        Raises:
            DataError: the file is damaged, or has more tokens than an int32 length can hold.
        """
        count.lines = 1
        found: list[tuple[_Record, npt.NDArray[np.int32]]] = []
        try:
            with reading(piece.file.path), opened(piece.file) as (stream, _):
                for part in parts_of_file(piece.file, self._divide) if self._divide else [WHOLE]:
                    long = None if self._finder is None else LongDocument(self._finder)
                    record = yield from self._part_tokens(stream, part, encoder, long)
                    if record is None:  # the rule of `checked_text`, which needs the whole text
                        count.skip("empty_document")
                        continue
                    if record.length > np.iinfo(np.int32).max:
                        raise DataError(
                            f"{piece.file.path}: has {record.length:,} tokens, more than a document can have; divide it with "
                            "--txt-documents blank-line"
                        )
                    found.append((record, np.zeros(0, dtype=np.int32) if long is None else long.finish()))
        except BadLine as bad:
            count.reject(1, bad)
            return
        for record, grams in found:
            self._overlaps.append(np.stack([np.full_like(grams, len(self._lengths)), grams], axis=1))
            self._record(record)

    def _part_tokens(
        self, stream: IO[bytes], part: Part, encoder: Encoder, long: LongDocument | None
    ) -> Generator[bytes, None, _Record | None]:
        """Encodes a part of a text file, adds its text to `long`, and yields the bytes of its tokens.

        Returns:
            The part's record, or None, without a token, if the part is white space only.
        """
        digest, length, size = DocumentDigest(self._seed), self._end.size, 0
        blank: list[bytes] | None = []  # tokens of the white space at the beginning; None after it
        for text in text_parts(PartStream(stream, part.end - part.start), part.start):
            utf8 = text.encode("utf-8")
            digest.update(utf8)
            size += len(utf8)
            if long is not None:
                long.add(utf8)
            (encoded,) = encoder.encode_documents([utf8])
            length += encoded.ids.size
            tokens = self._content(encoded.ids)
            if blank is None:
                yield tokens
            elif text.isspace():
                blank.append(tokens)
            else:
                yield from (*blank, tokens)
                blank = None
        if blank is not None:
            return None
        yield self._end.tobytes()
        return _Record(length, digest.first_bytes(), size, part.split)

    def _record(self, record: _Record) -> None:
        self._lengths.append(record.length)
        self._hashes.append(record.hash)
        self._text_bytes.append(record.text_bytes)
        self._splits.append(record.split)

    def to_bytes(self) -> bytes:
        """Returns the content of NAME.documents."""
        arrays: list[npt.NDArray[Any]] = [
            np.array(self._lengths, dtype="<i4"),
            np.frombuffer(b"".join(self._hashes), dtype="<u8").reshape(-1, 2).T,
            np.array(self._text_bytes, dtype="<i8"),
        ]
        if self._by_sentences:
            arrays += [np.array(self._sentences, dtype="<i4"), *(part.astype("<i4") for part in self._sentence_lengths)]
        if self._divide:
            arrays.append(np.array(self._splits, dtype=np.uint8))
        return b"".join(array.tobytes() for array in arrays)

    def overlaps(self) -> bytes:
        """Returns the content of NAME.overlaps."""
        return b"".join(each.astype("<i4").tobytes() for each in self._overlaps)

    def shard(self, name: str, tokens_sha256: str, count: ReadCount) -> EncodedShard:
        """Returns the shard's description."""
        overlaps = self.overlaps()
        return EncodedShard(
            name=name,
            documents=len(self._lengths),
            tokens=sum(self._lengths),
            sentences=sum(self._sentences),
            single_sentence_documents=self._sentences.count(1),
            divided_sentences=self._divided,
            text_bytes=sum(self._text_bytes),
            tokens_sha256=tokens_sha256,
            documents_sha256=hashlib.sha256(self.to_bytes()).hexdigest(),
            read=count,
            overlaps=len(overlaps) // 8,
            overlaps_sha256=hashlib.sha256(overlaps).hexdigest() if overlaps else "",
        )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
