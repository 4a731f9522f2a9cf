"""Merges the shards of a corpus into one pair of token files for each split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import IndexedWriter, token_dtype
from megatron_lion.data.manifest import SPLITS, SplitInfo
from megatron_lion.prepare.kept_documents import Selection
from megatron_lion.prepare.progress import Progress
from megatron_lion.prepare.shards import EncodedShard, shard_documents, shard_sentences, shard_splits, shard_tokens
from megatron_lion.prepare.splits import assign_splits, split_names, splits_by_range

logger = logging.getLogger(__name__)

LEFT_OUT = 255
"""Number of the split of a document that is left out."""


def splits_of_documents(
    shards: Sequence[EncodedShard],
    shards_folder: Path,
    split: tuple[float, float, float],
    selection: Selection,
    divided: bool,
) -> npt.NDArray[np.uint8]:
    """Returns the split of each document, or `LEFT_OUT`, shape (D,).

    Args:
        shards: shards in the corpus's order.
        shards_folder: folder of the shards.
        split: shares of train, valid and test in percent.
        selection: documents that are kept.
        divided: whether the shards hold parts of documents with their splits (`positions`), not whole documents.

    Raises:
        StorageError: a shard cannot be read.
    """
    found = [
        shard_splits(shards_folder, shard)
        if divided
        else splits_by_range(shard_documents(shards_folder, shard).hashes[0], split)
        for shard in shards
    ]
    members = np.concatenate(found)
    members[~selection.kept] = LEFT_OUT
    if not divided and any(split[index] > 0 and not np.any(members == index) for index in range(len(SPLITS))):
        # All hashes at once: an empty split takes the nearest document of the whole corpus, whatever its piece.
        hashes = np.concatenate([shard_documents(shards_folder, shard).hashes[0] for shard in shards])
        members[selection.kept] = assign_splits(hashes[selection.kept], split)
    return members


def write_splits(
    shards: Sequence[EncodedShard],
    shards_folder: Path,
    members: npt.NDArray[np.uint8],
    vocab_size: int,
    result: Path,
    threads: int,
    progress: Progress,
) -> dict[str, SplitInfo]:
    """Writes NAME_text_document.bin/.idx (BERT: NAME_text_sentence) for every split that has documents.

    Documents keep the order of the corpus.

    Args:
        shards: shards in the corpus's order, with at least one document in total.
        shards_folder: folder of the shards.
        members: from `splits_of_documents`.
        vocab_size: number of token ids; determines the dtype.
        result: folder to write into.
        threads: number of threads (`IndexedWriter`).
        progress: receives the number of bytes written.

    Returns:
        The splits by name.

    Raises:
        StorageError: a shard cannot be read or a token file cannot be written.
    """
    progress.stage("writing the splits", sum(shard.tokens for shard in shards) * token_dtype(vocab_size).itemsize)
    splits = {}
    for index, name in enumerate(SPLITS):
        if np.any(members == index):
            prefix = result / f"{name}_text_{'sentence' if any(shard.sentences for shard in shards) else 'document'}"
            splits[name] = _write_split(shards, shards_folder, members == index, vocab_size, prefix, threads, progress)
    return splits


def warn_of_absent_splits(
    splits: dict[str, SplitInfo], split: tuple[float, float, float], distinct: int, divided: bool
) -> None:
    """Prints a warning for each split with a share that got no document.

    Args:
        splits: splits that were written.
        split: shares of train, valid and test in percent.
        distinct: number of distinct documents that were kept.
        divided: as for `splits_of_documents`.
    """
    for name in split_names(split):
        if name not in splits and divided:
            logger.warning("no document is long enough for a %s split, which is left out", name)
        elif name not in splits:
            logger.warning(
                "only %d distinct document%s: too few for a %s split, which is left out",
                distinct, "s" * bool(distinct > 1), name,
            )  # fmt: skip


def _write_split(
    shards: Sequence[EncodedShard],
    shards_folder: Path,
    chosen: npt.NDArray[Any],
    vocab_size: int,
    prefix: Path,
    threads: int,
    progress: Progress,
) -> SplitInfo:
    """Copies the chosen documents, those of a shard at once."""
    first = 0
    with IndexedWriter(prefix, vocab_size, threads) as writer:
        for shard in shards:
            mine = chosen[first : first + shard.documents]
            first += shard.documents
            if not mine.any():
                continue
            lengths: npt.NDArray[Any] = shard_documents(shards_folder, shard).lengths
            tokens = shard_tokens(shards_folder, shard, vocab_size)
            sentences = shard_sentences(shards_folder, shard)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            edges = np.flatnonzero(np.diff(mine, prepend=False, append=False))
            runs = [tokens[offsets[begin] : offsets[end]] for begin, end in edges.reshape(-1, 2)]
            if sentences is None:
                writer.add_documents(runs, lengths[mine])
            else:
                counts, sentence_lengths = sentences
                writer.add_documents(runs, sentence_lengths[np.repeat(mine, counts)], counts[mine])
            progress.advance(sum(run.nbytes for run in runs))
        info = writer.finalize()
    return SplitInfo(
        prefix=prefix.name,
        documents=info.num_documents,
        tokens=info.num_tokens,
        bin_bytes=info.bin_bytes,
        idx_bytes=info.idx_bytes,
        bin_sha256=info.bin_sha256,
        idx_sha256=info.idx_sha256,
    )
