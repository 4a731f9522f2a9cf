"""13-grams of given texts in documents, against a plain implementation with Python's strings."""

from __future__ import annotations

import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.prepare.overlap import (
    Grams,
    LongDocument,
    N,
    OverlapFinder,
    grams_of,
    save_grams,
    saved_finder,
    union_of,
)


def words_of(text: str) -> list[str]:
    """Runs of letters, marks and numbers, ASCII letters in lower case: the definition, one character at a time."""
    found, word = [], ""
    for character in [*text, " "]:
        if unicodedata.category(character)[0] in "LMN":
            word += character.lower() if character.isascii() else character
        elif word:
            found.append(word)
            word = ""
    return found


def plain_grams(text: str) -> set[str]:
    words = words_of(text)
    return {" ".join(words[i : i + N]) for i in range(len(words) - N + 1)}


def all_words(grams: Grams) -> list[str]:
    return [grams.words(number).decode() for number in range(len(grams))]


def found_in(finder: OverlapFinder, grams: Grams, documents: list[str]) -> list[set[str]]:
    found: list[set[str]] = [set() for _ in documents]
    for document, number in finder.find([text.encode() for text in documents]).tolist():
        found[document].add(grams.words(number).decode())
    return found


# Few different words, so that random texts share passages: words at, below and above the hash's blocks of 8 bytes, a word
# that is hashed as a whole, letters and marks above ASCII, and everything that ends a word in two, three and four bytes.
_PIECES = ["a", "A", "é", "ÉCOLE", "abcdefgh", "ABCDEFGHi", "x" * 70, "７", "日本", "e\u0301", "𝔘"]
_BREAKS = [" ", ".", "\n", "\0", "_", "'", "\u2019", "\u00a0", "\u00d7", "。", "👩", "\u200d", " , "]
_TEXTS = st.lists(st.sampled_from(_PIECES * 2 + _BREAKS), max_size=60).map("".join)
_SPACED = st.lists(st.sampled_from(_PIECES), max_size=40).map(" ".join)


@examples(200)
@given(st.lists(st.one_of(_TEXTS, _SPACED), min_size=1, max_size=4), st.data())
def test_the_same_grams_as_with_strings(documents: list[str], data: st.DataObject) -> None:
    given_texts = [data.draw(st.one_of(_TEXTS, _SPACED)), documents[0][3:], documents[-1].upper()]
    grams = grams_of(text.encode() for text in given_texts)
    wanted = set.union(*map(plain_grams, given_texts))
    assert sorted(all_words(grams)) == sorted(wanted)
    finder = OverlapFinder(grams)
    expected = [plain_grams(text) & wanted for text in documents]
    assert found_in(finder, grams, documents) == expected
    for text, own in zip(documents, expected, strict=True):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        long = LongDocument(finder)
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            long.add(text[begin:end].encode())
        assert {grams.words(number).decode() for number in long.finish().tolist()} == own


def test_a_passage_is_found_in_another_typography() -> None:
    wikitext = " The city 's co @-@ op sold 1 @,@ 000 books in May , Anna said ; \n it closed . "
    web = "Yesterday the city’s CO-OP sold 1,000 books in May, “Anna” said; it closed."
    grams = grams_of([wikitext.encode()])
    assert all_words(grams).count("the city s co op sold 1 000 books in may anna said") == 1
    assert found_in(OverlapFinder(grams), grams, [web]) == [set(all_words(grams))]


def test_no_passage_reaches_over_the_end_of_a_document() -> None:
    words = [f"w{number}" for number in range(20)]
    grams = grams_of([" ".join(words).encode()])
    assert len(grams) == 20 - N + 1
    documents = [" ".join(words[:12]), " ".join(words[12:]), "", " ".join(words[3 : 3 + N])]
    found = found_in(OverlapFinder(grams), grams, documents)
    assert [len(each) for each in found] == [0, 0, 0, 1]
    # The text itself has two documents here, neither of which has 13 words.
    assert len(grams_of([" ".join(words[:12]).encode(), " ".join(words[12:]).encode()])) == 0


def test_equal_hashes_of_different_words_are_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"w{number}" for number in range(N))
    grams = grams_of([text.encode()])
    other = Grams(grams.hashes, b"x" + grams.text[1:], grams.starts, grams.ends)
    assert found_in(OverlapFinder(grams), grams, [text]) == [{text}]
    assert OverlapFinder(other).find([text.encode()]).size == 0


def test_a_cut_word_is_no_shorter_word() -> None:
    words = " ".join(f"w{number}" for number in range(N - 1))
    finder = OverlapFinder(grams_of([f"{words} cat".encode()]))
    for rest, found in (("alogue", 0), (" alogue", 1), ("", 1)):
        long = LongDocument(finder)
        for part in (f"{words} cat", rest):
            long.add(part.encode())
        assert len(long.finish()) == found


def test_few_words_among_many_other_characters_take_no_memory() -> None:
    long = LongDocument(OverlapFinder(grams_of([b"a b c d e f g h i j k l m"])))
    for word in b"a b c d e f g h i j k l m".split():
        long.add(word)
        for _ in range(5):
            long.add(b"- | \n" * 5000)
        assert len(long._held) < 30
    assert len(long.finish()) == 1


@pytest.mark.parametrize("size", [7, 8, 9, 15, 16, 17, 63, 64, 65, 200])
def test_words_that_differ_in_their_last_letter_are_different(size: int) -> None:
    words = " ".join(f"w{number}" for number in range(N - 1))
    texts = [f"{words} {'x' * (size - 1)}{last}" for last in "abc"]
    grams = grams_of([text.encode() for text in texts])
    assert sorted(all_words(grams)) == texts
    assert [len(each) for each in found_in(OverlapFinder(grams), grams, texts)] == [1, 1, 1]


def test_grams_come_back_from_their_file(tmp_path: Path) -> None:
    texts = ["日本 “a” b’s c d e f g h i j k l m n o p".encode(), b"q " * 30]
    grams = grams_of(texts)
    name = save_grams(tmp_path, grams)
    assert name == save_grams(tmp_path, grams_of(reversed(texts))), "the name depends on the content alone"
    assert saved_finder(tmp_path / name).find(texts).tolist() == OverlapFinder(grams).find(texts).tolist()
    assert len(OverlapFinder(grams).find(texts)) == len(grams) > 3


def test_grams_take_the_memory_of_their_text() -> None:
    """The words of each 13-gram for itself would take 13 times that of the text."""
    text = " ".join(f"word{number}" for number in range(100_000)).encode()
    grams_of([text])  # fills the caches of the module
    tracemalloc.start()
    grams = grams_of([text])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(grams) == 100_000 - N + 1
    assert held < len(text) + 24 * len(grams) + 2e6
    assert peak < 20 * len(text)


@examples(50)
@given(st.lists(st.lists(_SPACED, min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_union_is_that_of_all_texts(groups: list[list[str]]) -> None:
    union = union_of([grams_of(text.encode() for text in group) for group in groups])
    together = grams_of(text.encode() for group in groups for text in group)
    assert np.array_equal(union.hashes, together.hashes)
    assert all_words(union) == all_words(together)


def test_no_gram_at_all() -> None:
    grams = grams_of([b"too short"])
    assert len(grams) == 0
    assert OverlapFinder(grams).find([b"a b c d e f g h i j k l m n o p"]).shape == (0, 2)
