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
from megatron_lion.prepare.encode_piece import (
    EncodedShard,
    shard_documents,
    shard_sentences,
    shard_splits,
    shard_tokens,
)
from megatron_lion.prepare.progress import Progress
from megatron_lion.prepare.splits import assign_splits, split_names

logger = logging.getLogger(__name__)


def write_splits(
    shards: Sequence[EncodedShard],
    shards_folder: Path,
    split: tuple[float, float, float],
    vocab_size: int,
    result: Path,
    progress: Progress,
    divided: bool = False,
) -> tuple[dict[str, SplitInfo], int]:
    """Writes NAME_text_document.bin/.idx (BERT: NAME_text_sentence) for every split that has documents.

    Documents keep the order of the corpus.

    Args:
        shards: shards in the corpus's order, with at least one document in total.
        shards_folder: folder of the shards.
        split: shares of train, valid and test in percent.
        vocab_size: number of token ids; determines the dtype.
        result: folder to write into.
        progress: receives the number of bytes written.
        divided: whether the shards hold parts of documents with their splits (`positions`), not whole documents.

    Returns:
        (splits by name, number of documents whose text equals an earlier one's).

    Raises:
        StorageError: a shard cannot be read or a token file cannot be written.
    """
    # All hashes at once: an empty split takes the nearest document of the whole corpus, whatever its piece.
    hashes = np.concatenate([shard_documents(shards_folder, shard)[1] for shard in shards])
    distinct = np.unique(hashes).size
    if divided:
        members = np.concatenate([shard_splits(shards_folder, shard) for shard in shards])
    else:
        members = assign_splits(hashes, split)
    progress.stage("writing the splits", sum(shard.tokens for shard in shards) * token_dtype(vocab_size).itemsize)
    splits = {}
    for index, name in enumerate(SPLITS):
        if np.any(members == index):
            prefix = result / f"{name}_text_{'sentence' if any(shard.sentences for shard in shards) else 'document'}"
            splits[name] = _write_split(shards, shards_folder, members == index, vocab_size, prefix, progress)
    for name in split_names(split):
        if name not in splits and divided:
            logger.warning("no document is long enough for a %s split, which is left out", name)
        elif name not in splits:
            logger.warning(
                "only %d distinct document%s: too few for a %s split, which is left out",
                distinct, "s" * bool(distinct > 1), name,
            )  # fmt: skip
    return splits, int(hashes.size - distinct)


def _write_split(
    shards: Sequence[EncodedShard],
    shards_folder: Path,
    chosen: npt.NDArray[Any],
    vocab_size: int,
    prefix: Path,
    progress: Progress,
) -> SplitInfo:
    """Copies the chosen documents; each run of neighbours is one write."""
    first = 0
    with IndexedWriter(prefix, vocab_size) as writer:
        for shard in shards:
            mine = chosen[first : first + shard.documents]
            first += shard.documents
            if not mine.any():
                continue
            lengths, _ = shard_documents(shards_folder, shard)
            tokens = shard_tokens(shards_folder, shard, vocab_size)
            sentences = shard_sentences(shards_folder, shard)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            edges = np.flatnonzero(np.diff(mine, prepend=False, append=False))
            for begin, end in edges.reshape(-1, 2):
                run = tokens[offsets[begin] : offsets[end]]
                if sentences is None:
                    writer.add_documents(run, lengths[begin:end])
                else:
                    counts, sentence_lengths = sentences
                    first_sentence, end_sentence = counts[:begin].sum(), counts[:end].sum()
                    writer.add_documents(run, sentence_lengths[first_sentence:end_sentence], counts[begin:end])
                progress.advance(run.nbytes)
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
