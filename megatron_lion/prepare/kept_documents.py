"""Selects the documents of a corpus that are kept: not too short, the first of equal ones, without given passages.

All documents of the corpus are compared, whatever their piece. Memory stays at a few bytes a document: equal texts are
found among the hashes of one range after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lion.prepare.equal_hashes import equal_hashes
from megatron_lion.prepare.shards import EncodedShard, shard_documents, shard_overlaps, shard_sentences

FEW_TOKENS, DUPLICATE, CONTAMINATED = "fewer_tokens", "duplicate", "contaminated"
"""Names under which the documents that are left out are counted."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which documents are left out; by default none.

    Attributes:
        min_tokens: fewest tokens of a document, without the end-of-document token.
        deduplicate: whether a document is left out whose text equals an earlier one's.
        drop_contaminated: whether a document is left out that has a 13-gram of the given texts.
    """

    min_tokens: int = 0
    deduplicate: bool = False
    drop_contaminated: bool = False


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The D documents of a corpus that are kept.

    Attributes:
        kept: (D,) bool.
        tokens, text_bytes: totals of the documents that are kept.
        duplicates: number of documents that are kept and whose text equals an earlier one's.
        dropped: number of the others, by the first reason that applies.
        sentences, single_sentence_documents: numbers of sentences and of documents of one sentence among those that are
            kept; 0 if documents are not divided into sentences.
    """

    kept: npt.NDArray[np.bool_]
    tokens: int
    text_bytes: int
    duplicates: int
    dropped: dict[str, int]
    sentences: int
    single_sentence_documents: int


def select_documents(shards: Sequence[EncodedShard], folder: Path, rules: Rules, end_tokens: int) -> Selection:
    """Applies the rules to all documents: length first, then equal texts, then given passages.

    Args:
        shards: shards in the corpus's order.
        folder: folder of the shards.
        rules: which documents are left out.
        end_tokens: number of end-of-document tokens of each document, 0 or 1.

    Raises:
        StorageError: a shard cannot be read.
    """
    count = sum(shard.documents for shard in shards)
    kept = np.ones(count, dtype=np.bool_)
    repeated = _repeated(shards, folder, count)
    dropped: dict[str, int] = {}
    first = tokens = text_bytes = duplicates = sentences = single = 0
    for shard in shards:
        documents = shard_documents(folder, shard)
        mine = slice(first, first + shard.documents)
        first += shard.documents
        contaminated = np.zeros(shard.documents, dtype=np.bool_)
        contaminated[shard_overlaps(folder, shard)[:, 0]] = True
        for reason, chosen, applies in (
            (FEW_TOKENS, documents.lengths < rules.min_tokens + end_tokens, rules.min_tokens > 0),
            (DUPLICATE, repeated[mine], rules.deduplicate),
            (CONTAMINATED, contaminated, rules.drop_contaminated),
        ):
            if applies and (number := int((chosen & kept[mine]).sum())):
                dropped[reason] = dropped.get(reason, 0) + number
                kept[mine] &= ~chosen
        tokens += int(documents.lengths[kept[mine]].sum(dtype=np.int64))
        text_bytes += int(documents.text_bytes[kept[mine]].sum())
        duplicates += int((repeated[mine] & kept[mine]).sum())
        if divided := shard_sentences(folder, shard):
            sentences += int(divided[0][kept[mine]].sum())
            single += int((divided[0][kept[mine]] == 1).sum())
    return Selection(
        kept=kept, tokens=tokens, text_bytes=text_bytes, duplicates=duplicates, dropped=dropped, sentences=sentences,
        single_sentence_documents=single,
    )  # fmt: skip


def _repeated(shards: Sequence[EncodedShard], folder: Path, count: int) -> npt.NDArray[np.bool_]:
    """Returns which of the `count` documents have the 128-bit hash of an earlier one, shape (D,)."""
    repeated = np.zeros(count, dtype=np.bool_)
    for places, equal in equal_hashes(lambda: (shard_documents(folder, shard).hashes for shard in shards), count):
        repeated[places[equal]] = True
    return repeated
