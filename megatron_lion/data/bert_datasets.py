"""BERT's training samples from Megatron's dataset: two segments of one document, masked, in either order.

A sample is [CLS] A [SEP] B [SEP] of consecutive sentences. With p = ½, B comes first; the 2-way head predicts the order
(sentence order prediction). 15 % of the tokens are chosen as whole words in runs of up to three. They become [MASK]
(80 %), a random token (10 %) or stay (10 %). The choice depends on the seed and the sample's number alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig

from megatron_lion.config import DataConfig
from megatron_lion.data.index_arrays import open_arrays, unusable_documents
from megatron_lion.data.indexed_check import IndexedInfo
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError

LONGEST_SENTENCE = 512
"""Megatron's sample index skips every document with a longer sentence (LONG_SENTENCE_LEN in its helpers)."""


BertDatasetConfig = BERTMaskedWordPieceDatasetConfig


class WordPieceIds:
    """The attributes of a tokenizer that Megatron's BERT dataset reads.

    mcore 0.19.2: the dataset writes the padding id into masks and token types and treats every token of that id as
    padding; remove when padding is marked by position. -1 is no token's id, and `BertDataset` puts the real id in.
    """

    pad = -1

    def __init__(self, tokenizer: Tokenizer, digest: str) -> None:
        special = tokenizer.bert_special_ids()
        self.cls, self.sep, self.mask = special["[CLS]"], special["[SEP]"], special["[MASK]"]
        self.padding = special["[PAD]"]
        self.inv_vocab = {index: token for token, index in tokenizer.backend.get_vocab().items()}
        # Part of the name of Megatron's index cache: a hash of the content, so that new data never meets an old index.
        self.unique_identifiers = {"tokenizer": tokenizer.sha256, "data": digest}


class BertDataset(BERTMaskedWordPieceDataset):
    """Megatron's samples, with the masked tokens as a list of positions.

    Item i is a dict of int64 arrays:

    - (S,) for the S tokens: tokens, types (0 first segment, 1 second), padding_mask (1 token, 0 padding);
    - (M,) for the M = `most_masked` tokens that can be masked at most: positions, labels (the true tokens) and
      loss_mask (1 masked token, 0 unused entry);
    - (), a scalar: is_random, 1 if the segments are swapped.

    With positions the vocabulary's matrix multiplies M vectors instead of S, about a seventh.
    """

    def __init__(
        self,
        dataset: Any,
        path: str,
        indices: Any,
        num_samples: int | None,
        split: Any,
        config: BERTMaskedWordPieceDatasetConfig,
    ) -> None:
        """Builds the dataset with the arguments of Megatron's; `num_samples` None asks for one pass.

        mcore 0.19.2: MaskedWordPieceDataset hands None to C++ code that takes a number.
        """
        if num_samples is None:
            num_samples = _samples_in_one_pass(dataset, indices, config)
        super().__init__(dataset, path, indices, num_samples, split, config)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        real = sample["padding_mask"] > 0
        masked = np.flatnonzero(sample["loss_mask"])
        # A fixed size, whatever this sample masked, so that samples can be stacked into a batch.
        size = most_masked(self.config.sequence_length, self.config.masking_probability)
        positions, labels, loss_mask = np.zeros((3, size), dtype=np.int64)
        positions[: masked.size], labels[: masked.size], loss_mask[: masked.size] = masked, sample["labels"][masked], 1
        return {
            "tokens": np.where(real, sample["text"], self.config.tokenizer.padding),
            "types": np.maximum(sample["types"], 0),  # Megatron fills padding with the padding id, here -1
            "padding_mask": real.astype(np.int64),
            "positions": positions,
            "labels": labels,
            "loss_mask": loss_mask,
            "is_random": sample["is_random"],
        }

    @functools.cached_property
    def samples_in_one_pass(self) -> int:
        """Number of samples before any text repeats; later passes cut the documents at other places."""
        return _samples_in_one_pass(self.dataset, self.indices, self.config)


def _samples_in_one_pass(dataset: Any, indices: npt.NDArray[np.int32], config: BERTMaskedWordPieceDatasetConfig) -> int:
    # The call that Megatron's dataset makes, but for one epoch and without a limit. Three tokens of a sample are
    # [CLS] and two [SEP]; a sample needs two sentences.
    index = helpers.build_mapping(
        dataset.document_indices[np.append(indices, indices[-1] + 1)],
        dataset.sequence_lengths,
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
    """Largest number of masked tokens in a sample: the share of the tokens other than [CLS] and two [SEP], at least 1.

    Args:
        seq_length: tokens of a sample.
        probability: share of the tokens that are masked, in (0, 1).

    >>> most_masked(512, 0.15), most_masked(128, 0.15)
    (76, 18)
    """
    return max(1, int((seq_length - 3) * probability))


def bert_settings(tokenizer: Tokenizer, digest: str, data: DataConfig) -> dict[str, Any]:
    """Settings of Megatron's BERT dataset that other datasets do not have.

    Args:
        tokenizer: WordPiece tokenizer of the data.
        digest: content hash of the data (`Corpora.digest`).
        data: masking settings.

    Raises:
        DataError: the tokenizer is no WordPiece or lacks a special token.
    """
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
    """Rejects a part of the documents that gives no sample.

    Megatron's index skips documents of one sentence and documents with a sentence of more than 512 tokens. If no
    document is left, it loops without end.

    Args:
        info: the pair of token files.
        begin, end: range of the documents, as shares in [0, 1].

    Raises:
        DataError: the part has no usable document.
    """
    first, last = round(begin * info.num_documents), round(end * info.num_documents)
    try:
        with open_arrays(info.idx_path, info.num_sequences, info.num_documents + 1) as arrays:
            unusable = unusable_documents(arrays, first, last, LONGEST_SENTENCE)
    except OSError as error:
        raise DataError(f"{info.idx_path}: cannot be read: {error.strerror}") from None
    if unusable is not None:
        single, long = unusable
        raise DataError(
            f"{info.prefix}: none of its documents {first} to {last} can be used: {single} have one sentence (sentence order "
            f"needs two), {long} have a sentence of more than {LONGEST_SENTENCE} tokens; make the data with `megatron-lion "
            "prepare --task bert`, or give more text or larger shares for the splits"
        )
