"""BERT's samples: two segments of one document, masked and perhaps swapped, by Megatron's own dataset.

A sample is [CLS] A [SEP] B [SEP] of consecutive sentences, and with p = ½ B comes first, which the 2-way head must see
(sentence order). 15 % of the tokens are chosen as whole words in runs of up to three, and become [MASK] (80 %), a random
token (10 %) or stay (10 %). Which ones depends on the seed and the sample's number alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig

from megatron_lion.config import DataConfig
from megatron_lion.data.indexed_check import HEADER, IndexedInfo
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError

LONGEST_SENTENCE = 512
"""Megatron's sample index passes over every document with a longer sentence (LONG_SENTENCE_LEN in its helpers)."""


BertDatasetConfig = BERTMaskedWordPieceDatasetConfig


class WordPieceIds:
    """What Megatron's BERT dataset asks of a tokenizer.

    mcore 0.19.2: the dataset writes the padding id into masks and token types and takes every token of that id for
    padding; -1 is no token's id, and `BertDataset` puts the real one in; remove when padding is told by position.
    """

    pad = -1

    def __init__(self, tokenizer: Tokenizer, digest: str) -> None:
        special = tokenizer.bert_special_ids()
        self.cls, self.sep, self.mask = special["[CLS]"], special["[SEP]"], special["[MASK]"]
        self.padding = special["[PAD]"]
        self.inv_vocab = {index: token for token, index in tokenizer.backend.get_vocab().items()}
        self.unique_identifiers = {"tokenizer": tokenizer.sha256, "data": digest}


class BertDataset(BERTMaskedWordPieceDataset):
    """Megatron's samples, with the masked tokens as a list of places.

    Item i is a dict of int64 arrays. Over the S tokens: tokens, types (0 first segment, 1 second) and padding_mask (1 where
    there is a token). Over the M = `most_masked` tokens that can be masked at all: positions, labels (the true tokens)
    and loss_mask (1 where there is one, 0 where fewer are masked), so that the vocabulary's matrix works for these alone.
    And is_random, 1 where the segments are swapped.
    """

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        real = sample["padding_mask"] > 0
        masked = np.flatnonzero(sample["loss_mask"])
        size = most_masked(self.config.sequence_length, self.config.masking_probability)
        positions, labels, loss_mask = np.zeros((3, size), dtype=np.int64)
        positions[: masked.size], labels[: masked.size], loss_mask[: masked.size] = masked, sample["labels"][masked], 1
        return {
            "tokens": np.where(real, sample["text"], self.config.tokenizer.padding),
            "types": np.maximum(sample["types"], 0),
            "padding_mask": real.astype(np.int64),
            "positions": positions,
            "labels": labels,
            "loss_mask": loss_mask,
            "is_random": sample["is_random"],
        }

    @functools.cached_property
    def samples_in_one_pass(self) -> int:
        """Samples before any text comes again; later passes cut the documents elsewhere."""
        config = self.config
        index = helpers.build_mapping(
            self.dataset.document_indices[np.append(self.indices, self.indices[-1] + 1)],
            self.dataset.sequence_lengths,
            1,
            np.iinfo(np.int64).max,
            config.sequence_length - 3,
            config.short_sequence_probability,
            config.random_seed,
            False,
            2,
        )
        return int(index.shape[0])


def most_masked(seq_length: int, probability: float) -> int:
    """Masked tokens of a sample at most: Megatron masks no more than this share of what [CLS] and two [SEP] leave.

    >>> most_masked(512, 0.15), most_masked(128, 0.15)
    (76, 18)
    """
    return max(1, int((seq_length - 3) * probability))


def bert_settings(tokenizer: Tokenizer, digest: str, data: DataConfig) -> dict[str, Any]:
    """The settings of Megatron's BERT dataset besides those that every dataset has."""
    return {
        "tokenizer": WordPieceIds(tokenizer, digest),
        "masking_probability": data.mask_probability,
        "masking_max_ngram": data.mask_max_ngram,
        "short_sequence_probability": data.short_sequence_probability,
        "masking_do_full_word": True,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
        "masking_use_geometric_distribution": False,
        "classification_head": True,
    }


def check_sentences(info: IndexedInfo, begin: float, end: float) -> None:
    """Refuses a part of the documents that would give no sample.

    Megatron's index passes over documents of one sentence and over those with a sentence beyond 512 tokens, and
    looks for ever where that leaves none.

    Args:
        info: the files.
        begin, end: the part, as shares of the documents.

    Raises:
        DataError: not one usable document in it.
    """
    sentences, longest = _documents(info)
    usable = (sentences >= 2) & (longest <= LONGEST_SENTENCE)
    first, last = round(begin * info.num_documents), round(end * info.num_documents)
    part = slice(first, last)
    if not usable[part].any():
        single, long = int((sentences[part] == 1).sum()), int((longest[part] > LONGEST_SENTENCE).sum())
        raise DataError(
            f"{info.prefix}: none of its documents {first} to {last} can be used: {single} have one sentence (sentence order "
            f"needs two), {long} have a sentence of more than {LONGEST_SENTENCE} tokens; make it with `megatron-lion "
            "prepare --task bert`, give more text, or larger shares for the splits"
        )


def _documents(info: IndexedInfo) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(number of sentences, tokens of the longest) of each document."""
    index = info.idx_path.read_bytes()
    lengths = np.frombuffer(index, "<i4", info.num_sequences, HEADER.size).astype(np.int64)
    boundaries = np.frombuffer(index, "<i8", info.num_documents + 1, HEADER.size + 12 * info.num_sequences)
    sentences = np.diff(boundaries)
    longest = np.zeros(info.num_documents, np.int64)
    filled = np.flatnonzero(sentences)
    longest[filled] = np.maximum.reduceat(lengths, boundaries[filled])
    return sentences, longest
