"""BERT's training samples from Megatron's dataset: two segments of one document, masked, in either order.

A sample is [CLS] A [SEP] B [SEP] of consecutive sentences. With p = ½, B comes first; the 2-way head predicts the order
(sentence order prediction). 15 % of the tokens are chosen as whole words in runs of up to three. They become [MASK]
(80 %), a random token (10 %) or stay (10 %). The choice depends on the seed and the sample's number alone.

With `data.masking` vectorized (`masking.py`) the segments are those of Megatron's dataset, bit for bit, and the masks follow
the same rule with other draws. With megatron they are Megatron's.
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
from megatron_lion.data.masking import Masking, tokens_to_mask
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

    def __init__(self, tokenizer: Tokenizer, digest: str, data: DataConfig) -> None:
        special = tokenizer.bert_special_ids()
        self.cls, self.sep, self.mask = special["[CLS]"], special["[SEP]"], special["[MASK]"]
        self.padding = special["[PAD]"]
        self.inv_vocab = {index: token for token, index in tokenizer.backend.get_vocab().items()}
        masked = data.masking != "megatron"
        self.masking = Masking(self.inv_vocab, self.mask, data.mask_max_ngram) if masked else None
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
        self._random = np.random.RandomState(0)  # seeded for each sample: a new object takes 0.1 ms

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if (masking := self.config.tokenizer.masking) is not None:
            return self._sample(int(idx), masking)
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

    def _sample(self, idx: int, masking: Masking) -> dict[str, Any]:
        """Item `idx` with the draws of Megatron's `__getitem__` up to the masks, and those of `masking` after them."""
        config, ids = self.config, self.config.tokenizer
        begin, end, target = (int(value) for value in self.sample_index[idx])
        random = self._random
        random.seed((config.random_seed + idx) % 2**32)
        lengths = self.dataset.sequence_lengths[begin:end]
        pivot = random.randint(1, end - begin) if end - begin >= 3 else 1
        is_swapped = bool(random.random_sample() < 0.5)
        total, first = int(lengths.sum()), int(lengths[:pivot].sum())
        # mcore 0.19.2: get reads `length` tokens, also beyond the end of the sentence; the next one follows there.
        text = self.dataset.get(begin, 0, total).astype(np.int64)
        if text.size and int(text.view(np.uint64).max()) >= masking.vocab_size:  # also for negative ids
            raise DataError(
                f"{self.dataset_path}.bin: sample {idx} has token ids from {text.min()} to {text.max()}, the vocabulary has "
                f"{masking.vocab_size}: the file is damaged, or was made with another tokenizer; prepare the data again"
            )
        one, other = (text[first:], text[:first]) if is_swapped else (text[:first], text[first:])
        one, other = _cut(one, other, target, random)
        text = np.concatenate((one, other))
        size, first, second = text.size, one.size, one.size + 2
        length = size + (3 if other.size else 2)
        probability = config.masking_probability
        places, labels = masking.mask(text, first, tokens_to_mask(length, target, probability), random)
        sample = np.zeros((3, config.sequence_length), dtype=np.int64)
        tokens, types, padding_mask = sample
        tokens[0], tokens[1 : first + 1], tokens[first + 1] = ids.cls, text[:first], ids.sep
        tokens[second : second + other.size], tokens[length - 1], tokens[length:] = text[first:], ids.sep, ids.padding
        types[second:length], padding_mask[:length] = 1, 1
        masked = np.zeros((3, most_masked(config.sequence_length, probability)), dtype=np.int64)
        masked[0, : places.size], masked[1, : places.size] = places + 1 + (places >= first), labels
        masked[2, : places.size] = 1
        return {
            "tokens": tokens,
            "types": types,
            "padding_mask": padding_mask,
            "positions": masked[0],
            "labels": masked[1],
            "loss_mask": masked[2],
            "is_random": int(is_swapped),
        }

    @functools.cached_property
    def samples_in_one_pass(self) -> int:
        """Number of samples before any text repeats; later passes cut the documents at other places."""
        return _samples_in_one_pass(self.dataset, self.indices, self.config)


def _cut(
    one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], target: int, random: np.random.RandomState
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cuts two segments to `target` tokens together, with Megatron's draws.

    Megatron removes one token at a time from the longer segment (the second if they are equal), at its beginning or its end
    with p = ½. Which segment it takes follows from the lengths alone.
    """
    steps = np.arange(one.size + other.size - target)
    if not steps.size:
        return one, other
    uneven = abs(one.size - other.size)
    is_one = np.where(steps < uneven, one.size > other.size, (steps - uneven) % 2 == 1)
    at_begin = random.random_sample(steps.size) < 0.5

    def remaining(segment: npt.NDArray[np.int64], is_its: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        front, back = int((is_its & at_begin).sum()), int((is_its & ~at_begin).sum())
        return segment[front : segment.size - back]

    return remaining(one, is_one), remaining(other, ~is_one)


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
        "tokenizer": WordPieceIds(tokenizer, digest, data),
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
