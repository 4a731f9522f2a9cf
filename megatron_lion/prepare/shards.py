"""Reads the files of a shard, an encoded piece of the corpus.

NAME.json is the shard's description, NAME.tokens its token ids one after another. NAME.documents holds arrays over its D
documents, little-endian, one after another:

    int32    lengths[D], in tokens
    uint64   hashes[2, D], the 128-bit hash of each text in two halves; the first determines the split
    int64    text_bytes[D], UTF-8
    int32    sentences[D], and int32 lengths of the S sentences, only for BERT
    uint8    split[D], only if documents are divided by position

NAME.overlaps has int32 pairs (document, 13-gram of the given texts).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.files import sha256_file, storage_errors
from megatron_lion.prepare.pieces import ReadCount

_DOCUMENT_BYTES = 28


@dataclass(kw_only=True)
class EncodedShard:
    """Description of an encoded piece, as stored in NAME.json.

    Attributes:
        name: name of the shard's files, without ending.
        documents, tokens, text_bytes: counts; text_bytes is UTF-8.
        tokens_sha256, documents_sha256: hashes of NAME.tokens and NAME.documents.
        read: counts of lines read, skipped and rejected.
        sentences: number of sentences; 0, as the next two, if documents are not divided.
        single_sentence_documents: number of documents of one sentence.
        divided_sentences: number of sentences that were divided because they were too long.
        overlaps: number of pairs in NAME.overlaps (`overlap`), which only exists if there are some.
        overlaps_sha256: hash of NAME.overlaps, or "".
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
    overlaps: int = 0
    overlaps_sha256: str = ""


def load_shard(folder: Path, name: str) -> EncodedShard | None:
    """Returns the shard of an earlier run if it is complete and undamaged, else None."""
    try:
        content = json.loads((folder / f"{name}.json").read_bytes())
        shard = EncodedShard(**{**content, "read": ReadCount(**content["read"])})
        if sha256_file(folder / f"{name}.documents") != shard.documents_sha256:
            return None
        if shard.overlaps and sha256_file(folder / f"{name}.overlaps") != shard.overlaps_sha256:
            return None
        return shard if sha256_file(folder / f"{name}.tokens") == shard.tokens_sha256 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class ShardDocuments(NamedTuple):
    """Arrays over a shard's D documents.

    Attributes:
        lengths: (D,) int32, tokens with the end-of-document token.
        hashes: (2, D) uint64, halves of the 128-bit hash of the text.
        text_bytes: (D,) int64, size of the text in UTF-8.
    """

    lengths: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    text_bytes: npt.NDArray[np.int64]


def shard_documents(folder: Path, shard: EncodedShard) -> ShardDocuments:
    """Returns lengths, hashes and sizes of a shard's documents.

    Raises:
        StorageError: the file cannot be read.
    """
    count = shard.documents
    with storage_errors(folder / shard.name, "read"), open(folder / f"{shard.name}.documents", "rb") as stream:
        data = stream.read(_DOCUMENT_BYTES * count)
    hashes = np.frombuffer(data, "<u8", 2 * count, offset=4 * count).reshape(2, count)
    return ShardDocuments(
        np.frombuffer(data, "<i4", count), hashes, np.frombuffer(data, "<i8", count, offset=20 * count)
    )


def shard_overlaps(folder: Path, shard: EncodedShard) -> npt.NDArray[np.int32]:
    """Returns the pairs (document, 13-gram) of a shard, shape (K, 2).

    Raises:
        StorageError: the file cannot be read.
    """
    if not shard.overlaps:
        return np.zeros((0, 2), dtype=np.int32)
    with storage_errors(folder / shard.name, "read"):
        data = (folder / f"{shard.name}.overlaps").read_bytes()
    return np.frombuffer(data, "<i4").reshape(shard.overlaps, 2)


def shard_sentences(folder: Path, shard: EncodedShard) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
    """Returns (sentences of each document (D,), lengths of the sentences (S,)), or None if documents are not divided.

    Raises:
        StorageError: the file cannot be read.
    """
    if not shard.sentences:
        return None
    with storage_errors(folder / shard.name, "read"):
        data = (folder / f"{shard.name}.documents").read_bytes()
    start = _DOCUMENT_BYTES * shard.documents
    counts = np.frombuffer(data, "<i4", shard.documents, offset=start)
    return counts, np.frombuffer(data, "<i4", shard.sentences, offset=start + 4 * shard.documents)


def shard_splits(folder: Path, shard: EncodedShard) -> npt.NDArray[np.uint8]:
    """Returns the split of each part of a shard whose documents are divided by position, shape (D,).

    Raises:
        StorageError: the file cannot be read.
    """
    with storage_errors(folder / shard.name, "read"):
        data = (folder / f"{shard.name}.documents").read_bytes()
    return np.frombuffer(data, np.uint8)[len(data) - shard.documents :]


def shard_tokens(folder: Path, shard: EncodedShard, vocab_size: int) -> npt.NDArray[Any]:
    """Returns all tokens of a shard, shape (N,), as a read-only memory map.

    Raises:
        StorageError: the file cannot be read.
    """
    dtype = token_dtype(vocab_size)
    if shard.tokens == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    with storage_errors(folder / shard.name, "read"):
        return np.memmap(folder / f"{shard.name}.tokens", dtype=dtype, mode="r", shape=(shard.tokens,))
