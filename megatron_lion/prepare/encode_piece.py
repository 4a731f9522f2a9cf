"""Encodes one piece of a corpus into a shard: its tokens, and each document's length and hash.

A shard is three files in the work folder: NAME.tokens (ids one after another), NAME.documents (int32
lengths, then uint64 hashes; for BERT then int32 sentences of each document and int32 lengths of the sentences) and,
written last, NAME.json with counts and the SHA-256 of the other two. A shard whose NAME.json reads and whose files
match it is whole, and a later run takes it as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.files import sha256_file, storage_errors, write_whole
from megatron_lion.prepare.encoders import Encoder
from megatron_lion.prepare.pieces import Piece, ReadCount, ReadOptions, read_piece
from megatron_lion.prepare.sentences import SplitterName
from megatron_lion.prepare.splits import document_hash

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What a worker needs besides the tokenizer.

    Attributes:
        read: how documents are taken from files.
        eod_id: appended to every document, or None.
        seed: of the documents' hashes.
        vocab_size: decides the dtype of the tokens.
        splitter: of sentences where documents are to be sequences of them (BERT), else None.
    """

    read: ReadOptions
    eod_id: int | None
    seed: int
    vocab_size: int
    splitter: SplitterName | None = None


@dataclass(kw_only=True)
class Shard:
    """What encoding a piece gave: counts, hashes of the shard's files, and what reading met.

    The counts of sentences are 0 where documents are not divided: all of them, documents of a single one, and
    sentences that were divided because they were too long.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int
    tokens_sha256: str
    documents_sha256: str
    read: ReadCount
    sentences: int = 0
    single_sentence_documents: int = 0
    divided_sentences: int = 0

    def sentence_counts(self) -> dict[str, int]:
        """The counts of sentences under the names they have in the manifest; empty where documents are not divided."""
        if not self.sentences:
            return {}
        return {
            "sentences": self.sentences,
            "documents_of_one_sentence": self.single_sentence_documents,
            "divided_sentences": self.divided_sentences,
        }


def encode_piece(piece: Piece, folder: Path, name: str, settings: EncodeSettings, encoder: Encoder) -> Shard:
    """Reads, encodes and writes one piece.

    With on_error "stop", a piece with a bad line gives a shard whose `read.problems` names it; nothing is
    kept on the disk for it.

    Args:
        piece: what to encode.
        folder: the work folder's shards.
        name: of the shard.
        settings: see there.
        encoder: from `build_encoder`.

    Raises:
        DataError: the file is damaged.
        StorageError: the shard cannot be written.
    """
    tokens_path = folder / f"{name}.tokens"
    documents = _Documents(settings)
    count, digest = ReadCount(), hashlib.sha256()
    with storage_errors(tokens_path), open(tokens_path, "wb") as stream:
        for batch in _batches(read_piece(piece, settings.read, count)):
            content = documents.add(batch, encoder, count)
            digest.update(content)
            stream.write(content)
    shard = documents.shard(name, digest.hexdigest(), count)
    if settings.read.on_error == "stop" and count.problems:
        tokens_path.unlink()
        return shard
    write_whole(folder / f"{name}.documents", documents.to_bytes())
    write_whole(folder / f"{name}.json", json.dumps(dataclasses.asdict(shard)).encode())
    return shard


class _Documents:
    """What a shard says of its documents, filled batch by batch."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._seed = settings.seed
        dtype = token_dtype(settings.vocab_size)
        self._end = np.array([] if settings.eod_id is None else [settings.eod_id], dtype=dtype)
        self._by_sentences = settings.splitter is not None
        self._lengths: list[int] = []
        self._hashes: list[int] = []
        self._sentences: list[int] = []
        self._sentence_lengths: list[npt.NDArray[np.int32]] = []
        self._text_bytes = self._divided = 0

    def add(self, texts: Sequence[str], encoder: Encoder, count: ReadCount) -> bytes:
        """Encodes and records documents; returns their tokens as they are stored."""
        parts: list[npt.NDArray[Any]] = []
        for text, encoded in zip(texts, encoder.encode_documents(texts), strict=True):
            if self._by_sentences:
                if not encoded.lengths.size:  # nothing but control characters: a document of no sentence is none
                    count.skip("document without a token")
                    continue
                self._sentences.append(encoded.lengths.size)
                self._sentence_lengths.append(encoded.lengths)
                self._divided += encoded.divided
            utf8 = text.encode("utf-8")
            self._text_bytes += len(utf8)
            self._hashes.append(document_hash(utf8, self._seed))
            self._lengths.append(encoded.ids.size + self._end.size)
            parts += (encoded.ids, self._end)
        return np.concatenate(parts).tobytes() if parts else b""

    def to_bytes(self) -> bytes:
        """NAME.documents."""
        arrays = [np.array(self._lengths, dtype="<i4"), np.array(self._hashes, dtype="<u8")]
        if self._by_sentences:
            arrays += [np.array(self._sentences, dtype="<i4"), *(part.astype("<i4") for part in self._sentence_lengths)]
        return b"".join(array.tobytes() for array in arrays)

    def shard(self, name: str, tokens_sha256: str, count: ReadCount) -> Shard:
        """The shard's description."""
        return Shard(
            name=name,
            documents=len(self._lengths),
            tokens=sum(self._lengths),
            sentences=sum(self._sentences),
            single_sentence_documents=self._sentences.count(1),
            divided_sentences=self._divided,
            text_bytes=self._text_bytes,
            tokens_sha256=tokens_sha256,
            documents_sha256=hashlib.sha256(self.to_bytes()).hexdigest(),
            read=count,
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


def load_shard(folder: Path, name: str) -> Shard | None:
    """The shard of an earlier run if it is whole and undamaged, else None."""
    try:
        content = json.loads((folder / f"{name}.json").read_bytes())
        shard = Shard(**{**content, "read": ReadCount(**content["read"])})
        if sha256_file(folder / f"{name}.documents") != shard.documents_sha256:
            return None
        return shard if sha256_file(folder / f"{name}.tokens") == shard.tokens_sha256 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def shard_documents(folder: Path, shard: Shard) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """(lengths, hashes) of a shard's documents."""
    with storage_errors(folder / shard.name, "read"):
        data = (folder / f"{shard.name}.documents").read_bytes()
    return np.frombuffer(data, "<i4", shard.documents), np.frombuffer(
        data, "<u8", shard.documents, offset=4 * shard.documents
    )


def shard_sentences(folder: Path, shard: Shard) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
    """(sentences of each document, lengths of the sentences) of a shard, or None where documents are not divided."""
    if not shard.sentences:
        return None
    with storage_errors(folder / shard.name, "read"):
        data = (folder / f"{shard.name}.documents").read_bytes()
    start = 12 * shard.documents
    counts = np.frombuffer(data, "<i4", shard.documents, offset=start)
    return counts, np.frombuffer(data, "<i4", shard.sentences, offset=start + 4 * shard.documents)


def shard_tokens(folder: Path, shard: Shard, vocab_size: int) -> npt.NDArray[Any]:
    """All tokens of a shard, mapped from the disk."""
    dtype = token_dtype(vocab_size)
    if shard.tokens == 0:
        return np.zeros(0, dtype=dtype)
    with storage_errors(folder / shard.name, "read"):
        return np.memmap(folder / f"{shard.name}.tokens", dtype=dtype, mode="r", shape=(shard.tokens,))
