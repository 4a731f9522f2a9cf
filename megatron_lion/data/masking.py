"""Chooses and replaces the masked tokens of a BERT sample with few numpy calls, by the rule of Megatron's dataset.

The rule, for a text of W words (a word is a piece and the ##pieces after it) and at most M masked tokens:

1. The words are taken in random order. For each, a number n of words is drawn, 1 to `max_ngram`, with p ∝ 1/n.
2. The run is this word and the n − 1 after it, as far as the text reaches. While it has more tokens than are left of M, its
   last word is dropped; if the first word alone has more, nothing is masked here.
3. If any word of the run is masked already, nothing is masked here. It is not tried with a smaller n.
4. It ends when M tokens are masked, or after the last word.
5. Each masked token becomes [MASK] (80 %), a random id of the whole vocabulary (10 %), or stays (10 %), independently.

So runs are shorter than drawn near the end of the text and near the end of M, and neighbouring runs may touch. A run may
cross from the first segment into the second, around [SEP].

One deliberate difference: if the text of the second segment was cut within a word, Megatron counts its first ##piece as
part of the last word of the first segment. Here it is a word of its own, so no word reaches across [SEP].

Source of the rule: megatron.core.datasets.masked_dataset (megatron-core 0.19.2). There it takes several calls of numpy for
each token; see docs/bert.md for the times of both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


class Masking:
    """The rule for one vocabulary, with the tables that do not depend on the sample.

    Attributes:
        vocab_size: ids are below it.
        max_ngram: largest number of words of a run.
    """

    def __init__(self, tokens: Mapping[int, str], mask: int, max_ngram: int) -> None:
        """Computes the tables.

        Args:
            tokens: token by id.
            mask: id of [MASK].
            max_ngram: largest number of words of a run, at least 1.
        """
        self.vocab_size, self.max_ngram, self._mask = max(tokens) + 1, max_ngram, mask
        self._is_continuation = np.zeros(self.vocab_size, dtype=bool)
        self._is_continuation[[index for index, token in tokens.items() if token.startswith("##")]] = True
        self._ids = np.array(sorted(tokens), dtype=np.int64)
        weights = 1.0 / np.arange(1, max_ngram + 1)
        self._below = np.cumsum(weights / weights.sum())[:-1]

    def mask(
        self, text: npt.NDArray[np.int64], first: int, most: int, random: np.random.RandomState
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Masks tokens of a text in place.

        Args:
            text: (T,) ids of both segments without special tokens, all below `vocab_size`.
            first: tokens of the first segment.
            most: largest number of masked tokens, M.
            random: source of all draws.

        Returns:
            (places, labels): the masked places in ascending order, and the true ids there, both (m ≤ M,).
        """
        starts_word = ~self._is_continuation[text]
        starts_word[:1] = starts_word[first : first + 1] = True
        words = np.flatnonzero(starts_word)
        order = random.permutation(words.size)
        lengths = np.searchsorted(self._below, random.random_sample(words.size), side="right") + 1
        places = np.array(choose([*words.tolist(), text.size], order.tolist(), lengths.tolist(), most), dtype=np.int64)
        places.sort()
        labels = text[places]
        draw = random.random_sample(places.size)
        other = self._ids[random.randint(0, self._ids.size, places.size)]
        text[places] = np.where(draw < 0.8, self._mask, np.where(draw < 0.9, other, labels))
        return places, labels


def tokens_to_mask(length: int, target: int, probability: float) -> int:
    """Largest number of masked tokens of a sample, M.

    Args:
        length: its tokens, special tokens included.
        target: tokens that it may have at most, without special tokens.
        probability: share of the tokens that are masked.

    >>> tokens_to_mask(512, 509, 0.15), tokens_to_mask(30, 509, 0.15), tokens_to_mask(9, 6, 0.15)
    (76, 4, 0)
    """
    return int(min(probability * target, max(1, round(length * probability))))


def choose(bounds: list[int], order: list[int], lengths: list[int], most: int) -> list[int]:
    """Returns the masked places, in the order in which they are chosen.

    Args:
        bounds: first token of each of the W words, and the number of tokens at the end.
        order: the words in the order in which they are taken.
        lengths: number of words drawn for each, in the same order.
        most: largest number of masked tokens.

    The run of three words from word 1 on is refused, because word 3 is masked:

    >>> choose([0, 2, 3, 4, 5], [3, 1, 0], [2, 3, 1], 4)
    [4, 0, 1]
    """
    places: list[int] = []
    is_masked = bytearray(len(order) + 1)
    left = most
    for word, length in zip(order, lengths, strict=True):
        if left <= 0:
            break
        begin, last = bounds[word], min(word + length, len(bounds) - 1)
        while bounds[last] - begin > left:
            last -= 1
        # A run without a word holds nothing; a masked word inside refuses the run.
        if last > word and not any(is_masked[word:last]):
            is_masked[word:last] = b"\1" * (last - word)
            places.extend(range(begin, bounds[last]))
            left -= bounds[last] - begin
    return places
