"""Encodes one piece of a corpus into a shard: its tokens, and each document's length and hash.

A shard is three files in the work folder: NAME.tokens (ids one after another), NAME.documents (int32
lengths, then uint64 hashes) and, written last, NAME.json with counts and the SHA-256 of the other two. A shard
whose NAME.json reads and whose files match it is whole, and a later run takes it as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.encoders import Encoder
from data_prep.pieces import Piece, ReadCount, ReadOptions, read_piece
from data_prep.splits import document_hash
from megatron_lion.data.files import sha256_file, storage_errors, write_whole
from megatron_lion.data.indexed import token_dtype

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
    """

    read: ReadOptions
    eod_id: int | None
    seed: int
    vocab_size: int


@dataclass(kw_only=True)
class Shard:
    """What encoding a piece gave: counts, hashes of the shard's files, and what reading met."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    tokens_sha256: str
    documents_sha256: str
    read: ReadCount


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
    dtype = token_dtype(settings.vocab_size)
    end = np.array([] if settings.eod_id is None else [settings.eod_id], dtype=dtype)
    tokens_path = folder / f"{name}.tokens"
    count, digest, text_bytes = ReadCount(), hashlib.sha256(), 0
    lengths: list[int] = []
    hashes: list[int] = []
    with storage_errors(tokens_path), open(tokens_path, "wb") as stream:
        for batch in _batches(read_piece(piece, settings.read, count)):
            parts: list[npt.NDArray[Any]] = []
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                utf8 = text.encode("utf-8")
                text_bytes += len(utf8)
                hashes.append(document_hash(utf8, settings.seed))
                lengths.append(ids.size + end.size)
                parts += (ids, end)
            content = np.concatenate(parts).tobytes()
            digest.update(content)
            stream.write(content)
    documents = np.array(lengths, dtype="<i4").tobytes() + np.array(hashes, dtype="<u8").tobytes()
    shard = Shard(
        name=name,
        documents=len(lengths),
        tokens=sum(lengths),
        text_bytes=text_bytes,
        tokens_sha256=digest.hexdigest(),
        documents_sha256=hashlib.sha256(documents).hexdigest(),
        read=count,
    )
    if settings.read.on_error == "stop" and count.problems:
        tokens_path.unlink()
        return shard
    write_whole(folder / f"{name}.documents", documents)
    write_whole(folder / f"{name}.json", json.dumps(dataclasses.asdict(shard)).encode())
    return shard


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
    return np.frombuffer(data, "<i4", shard.documents), np.frombuffer(data, "<u8", offset=4 * shard.documents)


def shard_tokens(folder: Path, shard: Shard, vocab_size: int) -> npt.NDArray[Any]:
    """All tokens of a shard, mapped from the disk."""
    dtype = token_dtype(vocab_size)
    if shard.tokens == 0:
        return np.zeros(0, dtype=dtype)
    with storage_errors(folder / shard.name, "read"):
        return np.memmap(folder / f"{shard.name}.tokens", dtype=dtype, mode="r", shape=(shard.tokens,))
