"""The vectorized masks of BERT: Megatron's function is the oracle, with the same draws and with its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset
from tiny_bert import VOCAB, documents, write_bert_corpus

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.bert_datasets import most_masked
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.data.masking import Masking, choose, tokens_to_mask
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.parallel import process_groups

TOKENS = dict(enumerate(VOCAB))
CLS, SEP, MASK = (VOCAB.index(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
PIECES = np.array([index for index, token in TOKENS.items() if token.startswith("##")])
WORDS = np.array([index for index, token in TOKENS.items() if not token.startswith(("##", "["))])
PROBABILITY = 0.15


def random_text(random: np.random.Generator, size: int) -> np.ndarray:
    """Ids of which 30 % are continuations; the first is none."""
    text = np.where(random.random(size) < 0.3, random.choice(PIECES, size), random.choice(WORDS, size))
    text[0] = random.choice(WORDS)
    return text


def random_segments(random: np.random.Generator, least: int, most: int) -> tuple[np.ndarray, int]:
    """The ids of two segments, and the size of the first."""
    first, second = random_text(random, random.integers(least, most)), random_text(random, random.integers(least, most))
    return np.concatenate((first, second)), first.size


def megatron(text: np.ndarray, first: int, target: int, max_ngram: int, source: Any) -> tuple[list[int], list[int]]:
    """Megatron's own function: (places in the text without special tokens, ids after masking)."""
    names = SimpleNamespace(cls=CLS, sep=SEP, mask=MASK, inv_vocab=TOKENS)
    config = SimpleNamespace(
        tokenizer=names, masking_do_full_word=True, masking_probability=PROBABILITY, masking_max_ngram=max_ngram,
        masking_use_longer_ngrams=False, masking_use_geometric_distribution=False, masking_do_permutation=False,
    )  # fmt: skip
    dataset: Any = SimpleNamespace(config=config, token_lookup=sorted(TOKENS))
    dataset._get_token_mask = lambda random: BERTMaskedWordPieceDataset._get_token_mask(dataset, random)
    ids = [CLS, *text[:first].tolist(), SEP, *text[first:].tolist(), SEP]
    function = BERTMaskedWordPieceDataset._create_masked_lm_predictions
    shown, places, labels, _, _ = function(dataset, ids, target, source)
    assert [ids[place] for place in places] == labels
    return [place - 1 - (place > first) for place in places], [shown[place] for place in places]


class Replay:
    """A random state for Megatron's function that gives the draws that `choose` was given."""

    def __init__(self, order: list[int], lengths: list[int], max_ngram: int) -> None:
        self.order, self.lengths, self.max_ngram = order, iter(lengths), max_ngram

    def shuffle(self, items: list[Any]) -> None:
        items[:] = [items[place] for place in self.order]

    def choice(self, values: Any, p: Any) -> int:
        chances = 1 / np.arange(1, self.max_ngram + 1)
        assert np.allclose(p, chances / chances.sum())
        assert list(values) == list(range(1, self.max_ngram + 1))
        return next(self.lengths)

    def random(self) -> float:
        return 0.0  # [MASK]


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_the_same_draws_choose_the_same_tokens_as_megatrons(max_ngram: int) -> None:
    random = np.random.default_rng(max_ngram)
    for _ in range(300):
        text, first = random_segments(random, 1, 40)
        target = int(random.choice([text.size, 61, 125]))
        words = [place for place in range(text.size) if place in (0, first) or text[place] in WORDS]
        order = random.permutation(len(words)).tolist()
        lengths = random.integers(1, max_ngram + 1, len(words)).tolist()
        most = tokens_to_mask(text.size + 3, target, PROBABILITY)
        found = choose([*words, text.size], order, lengths, most)
        expected, _ = megatron(text, first, target, max_ngram, Replay(order, lengths, max_ngram))
        assert sorted(found) == expected
        assert len(found) <= most


def statistics(text: np.ndarray, first: int, places: Any, shown: Any) -> list[float]:
    """Numbers of a masked text: masked tokens, runs of 1, 2, 3 and more words, places, sizes of words, replacements."""
    masked = np.zeros(text.size, bool)
    masked[places] = True
    starts = np.flatnonzero(np.isin(text, WORDS))
    sizes = np.diff([*starts, text.size])
    chosen = masked[starts]
    assert np.array_equal(np.repeat(chosen, sizes), masked), "whole words"
    edges = np.flatnonzero(np.diff([0, *chosen.astype(int), 0]))
    runs = np.minimum(edges[1::2] - edges[::2], 4)
    labels, shown = text[places], np.array(shown)
    kinds = [np.mean(shown == MASK), np.mean(shown == labels), np.mean((shown != MASK) & (shown != labels))]
    by_size = [chosen[sizes == size].mean() if (sizes == size).any() else 0.15 for size in (1, 2, 3, 4)]
    places_of_interest = [chosen[0], chosen[-1], masked[:first].mean(), masked[first - 1], masked[first]]
    return [masked.sum(), *(np.sum(runs == length) for length in (1, 2, 3, 4)), *kinds, *by_size, *places_of_interest]


def test_the_masks_have_the_statistics_of_megatrons() -> None:
    """Means over 1,800 texts, each with its own draws on both sides, within five standard errors of their difference."""
    random = np.random.default_rng(1)
    masking = Masking(TOKENS, MASK, 3)
    ours, theirs = [], []
    for number in range(1800):
        text, first = random_segments(random, 20, 60)
        places, shown = megatron(text, first, 125, 3, np.random.RandomState(number))
        theirs.append(statistics(text, first, places, shown))
        masked = text.copy()
        found, labels = masking.mask(
            masked, first, tokens_to_mask(text.size + 3, 125, PROBABILITY), np.random.RandomState(10**6 + number)
        )
        assert np.array_equal(labels, text[found])
        assert np.all(np.diff(found) > 0)
        changed = np.flatnonzero(masked != text)
        assert set(changed) <= set(found.tolist())
        ours.append(statistics(text, first, found, masked[found]))
    one, other = np.array(ours, float), np.array(theirs, float)
    error = np.sqrt((one.var(0) + other.var(0)) / len(one))
    deviation = np.abs(one.mean(0) - other.mean(0)) / error
    assert deviation.max() < 5, deviation.round(1)
    assert np.all(other.mean(0)[1:5] > 0.05), "every length of run occurs"
    assert 0.79 < one[:, 5].mean() < 0.81


def test_random_tokens_are_of_the_whole_vocabulary() -> None:
    masking = Masking(TOKENS, MASK, 1)
    seen = np.zeros(len(VOCAB))
    for number in range(400):
        text = np.full(2000, WORDS[0])
        places, _ = masking.mask(text, 1000, 2000, np.random.RandomState(number))
        shown = text[places]
        seen += np.bincount(shown[(shown != MASK) & (shown != WORDS[0])], minlength=len(VOCAB))
    others = np.delete(seen, [MASK, WORDS[0]])
    assert abs(others.sum() / (400 * 2000) - 0.1 * others.size / len(VOCAB)) < 5 * (0.1 * 0.9 / 800_000) ** 0.5
    assert np.all(np.abs(others - others.mean()) < 5 * others.mean() ** 0.5)


def test_a_word_never_reaches_across_sep() -> None:
    """The second segment was cut within a word: its first piece is a word of its own."""
    masking = Masking(TOKENS, MASK, 1)
    text = np.array([WORDS[0], PIECES[0], PIECES[1], PIECES[2]])
    found = {tuple(masking.mask(text.copy(), 2, 2, np.random.RandomState(seed))[0].tolist()) for seed in range(40)}
    assert found == {(0, 1), (2, 3)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bert_corpus(tmp_path_factory.mktemp("masking"), documents(40, 60, seed=3))


def build(path: str, cache: Path, masking: Any, count: int, seed: int = 7) -> Any:
    model = ModelConfig(kind="bert", seq_length=64, make_vocab_size_divisible_by=64)
    corpora = open_corpora(DataConfig(path=[path], masking=masking), model)
    with process_groups(Device("cpu", 0, "gloo")):
        return build_datasets(corpora, model, (count, 0, 0), seed=seed, cache=cache)[0]


def test_the_samples_are_megatrons_but_for_the_masks(corpus: str, tmp_path: Path) -> None:
    """Segments, order, cuts, types and padding are those of Megatron's dataset, bit for bit."""
    ours, theirs = (build(corpus, tmp_path, name, 1000) for name in ("vectorized", "megatron"))
    assert len(list(tmp_path.glob("*/*sample_index.npy"))) == 1, "both use the same index"
    other_masks = 0
    for number in range(1000):
        one, other = ours[number], theirs[number]
        assert {key: np.asarray(value).shape for key, value in one.items()} == {
            key: np.asarray(value).shape for key, value in other.items()
        }
        assert all(value.dtype == np.int64 for key, value in one.items() if key != "is_random")
        for sample in (one, other):
            used = sample["loss_mask"] > 0
            sample["tokens"][sample["positions"][used]] = sample["labels"][used]
        for key in ("tokens", "types", "padding_mask", "is_random"):
            assert np.array_equal(one[key], other[key]), (number, key)
        other_masks += not np.array_equal(one["positions"], other["positions"])
        assert one["loss_mask"].sum() <= most_masked(64, PROBABILITY)
    assert other_masks > 700


def test_no_draw_outside_of_the_sample_has_an_effect(corpus: str, tmp_path: Path) -> None:
    dataset = build(corpus, tmp_path, "vectorized", 50)

    def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(np.array_equal(one[key], other[key]) for key in one)

    first = [dataset[number] for number in range(20)]
    for number in reversed(range(20)):
        np.random.seed(number)
        assert equal(dataset[number], first[number])
    assert not equal(build(corpus, tmp_path / "other", "vectorized", 50, seed=8)[3], first[3])


@pytest.mark.parametrize("token", [len(VOCAB), 65_000])
def test_an_id_beyond_the_vocabulary_is_named(corpus: str, tmp_path: Path, token: int) -> None:
    dataset = build(corpus, tmp_path, "vectorized", 20)
    plain = dataset.dataset

    def damaged(*arguments: Any) -> Any:
        found = plain.get(*arguments).copy()
        found[-1] = token
        return found

    dataset.dataset = SimpleNamespace(sequence_lengths=plain.sequence_lengths, get=damaged)
    with pytest.raises(
        DataError, match=rf"\.bin: sample 3 has token ids .* to {token}, the vocabulary has {len(VOCAB)}"
    ):
        dataset[3]
