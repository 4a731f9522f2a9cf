"""Finds passages of given texts in documents: runs of 13 words that both contain, whatever their case and punctuation.

A word is a run of letters, marks and numbers (Unicode's categories L, M and N); ASCII letters are compared in lower
case. So "Don't stop" and "don ' t stop" have the same words. Every run of N = 13 words of one document is a 13-gram.

Each 13-gram has a 64-bit hash, computed for all words of a batch by numpy. A hash that is among those of the given texts
is confirmed by a comparison of the words themselves, so a reported 13-gram is never a collision.

Source of the rule: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lion.files import storage_errors, write_whole

N = 13
"""Number of words of a run that counts as overlap."""

_ASCII = bytes(code + 32 if 65 <= code <= 90 else code if chr(code).isalnum() else 0 for code in range(128))
_TABLE = _ASCII + bytes(range(128, 256))  # lower case, and 0 for what is no part of a word
_LONG_WORD = 64
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_FILTER_BITS = 23
_BATCH_BYTES = 1 << 20

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Grams:
    """The distinct 13-grams of some texts.

    Attributes:
        hashes: (G,) uint64, sorted.
        text: the texts' words in lower case, joined by blanks, and a line feed after each document.
        starts, ends: (G,) int64, place of each 13-gram in `text`.
    """

    hashes: Hashes
    text: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return self.hashes.size

    def words(self, number: int) -> bytes:
        """Returns the words of one 13-gram, joined by blanks."""
        return self.text[self.starts[number] : self.ends[number]]


@dataclass(frozen=True)
class _Words:
    """Words of a batch of D documents.

    Attributes:
        content: the bytes in lower case, 0 between words, with 8 zero bytes at the end.
        starts, ends: (W,) int64, place of each word in `content`.
        documents: (D,) int64, place at which each document begins.
    """

    content: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    def gram(self, first: int) -> bytes:
        """Returns the words of the 13-gram that begins with a word, joined by blanks."""
        return b" ".join(self.content[self.starts[first] : self.ends[first + N - 1]].replace(b"\0", b" ").split())


def grams_of(documents: Iterable[bytes]) -> Grams:
    """Returns the distinct 13-grams of some documents.

    Args:
        documents: their UTF-8 bytes.
    """
    found = [Grams(np.zeros(0, np.uint64), b"", np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for batch in _batches(documents):
        lines = [b" ".join(_lower(utf8).replace(b"\0", b" ").split()) for utf8 in batch]
        words = _words(lines)
        hashes = _gram_hashes(words)
        first = np.arange(hashes.size)
        whole = np.flatnonzero(_document_of(words, first) == _document_of(words, first + N - 1))
        distinct, places = np.unique(hashes[whole], return_index=True)
        first = whole[places]
        text = b"".join(line + b"\n" for line in lines)
        found.append(Grams(distinct, text, words.starts[first], words.ends[first + N - 1]))
    return union_of(found)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for utf8 in documents:
        batch.append(utf8)
        size += len(utf8)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _document_of(words: _Words, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the document of each word of these numbers."""
    return np.searchsorted(words.documents, words.starts[numbers], "right") - 1


def union_of(several: Sequence[Grams]) -> Grams:
    """Returns the 13-grams that are in any of several collections, each once.

    Args:
        several: at least one collection.
    """
    hashes, places = np.unique(np.concatenate([one.hashes for one in several]), return_index=True)
    offsets = np.cumsum([0, *(len(one.text) for one in several)])
    starts, ends = (
        np.concatenate([each + offset for each, offset in zip(arrays, offsets[:-1], strict=True)])[places]
        for arrays in ([one.starts for one in several], [one.ends for one in several])
    )
    return Grams(hashes, b"".join(one.text for one in several), starts, ends)


def save_grams(folder: Path, grams: Grams) -> str:
    """Writes the text of 13-grams to a file that is named after their hashes, and returns its name.

    Raises:
        StorageError: the file cannot be written.
    """
    name = f"{hashlib.sha256(grams.hashes.tobytes()).hexdigest()[:32]}.grams"
    write_whole(folder / name, grams.text)
    return name


@functools.lru_cache(maxsize=1)
def saved_finder(path: Path) -> OverlapFinder:
    """Returns a finder of the 13-grams in a file of `save_grams`.

    Raises:
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "read"):
        return OverlapFinder(grams_of(path.read_bytes().splitlines()))


class OverlapFinder:
    """Finds the 13-grams of given texts in documents.

    Args:
        grams: 13-grams of the texts.
    """

    def __init__(self, grams: Grams) -> None:
        self._grams = grams
        # One byte for each value of a hash's first bits: most hashes of a corpus are excluded by one look.
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
        self._filter[self._places(grams.hashes)] = True

    @staticmethod
    def _places(hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).view(np.int64)

    def find(self, documents: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Returns which 13-grams occur in which documents.

        Args:
            documents: their UTF-8 bytes.

        Returns:
            (K, 2) int32: number of the document and of the 13-gram in `grams`; sorted, each pair once.
        """
        words = _words(documents)
        hashes = _gram_hashes(words)
        candidates = np.flatnonzero(self._filter[self._places(hashes)])
        found: set[tuple[int, int]] = set()
        if candidates.size and len(self._grams):
            chosen = hashes[candidates]
            places = np.minimum(np.searchsorted(self._grams.hashes, chosen), len(self._grams) - 1)
            equal = self._grams.hashes[places] == chosen
            firsts = candidates[equal]
            owners, ends = _document_of(words, firsts), _document_of(words, firsts + N - 1)
            for first, place, owner, end in zip(
                *(each.tolist() for each in (firsts, places[equal], owners, ends)), strict=True
            ):
                if owner == end and words.gram(first) == self._grams.words(place):
                    found.add((owner, place))
        return np.array(sorted(found), dtype=np.int32).reshape(-1, 2)


class LongDocument:
    """Finds the 13-grams of given texts in a document that arrives in parts.

    Args:
        finder: finds them in each part.
    """

    def __init__(self, finder: OverlapFinder) -> None:
        self._finder = finder
        self._held = b""
        self._found: set[int] = set()

    def add(self, utf8: bytes) -> None:
        """Adds the next part of the text, whole characters; a word may continue in the next part."""
        text = self._held + utf8
        words = _words([text])
        # A word that ends with the text may be the beginning of a longer one, and is looked at with the next part.
        complete = int(np.searchsorted(words.ends, len(text)))
        if complete:
            self._take(text[: words.ends[complete - 1]])
        # The last words alone, since there may be any amount of other characters between them.
        first = max(0, complete - N + 1)
        held = [words.content[a:b] for a, b in zip(words.starts[first:], words.ends[first:], strict=True)]
        self._held = b" ".join(held if len(words.ends) > complete else [*held, b""])

    def _take(self, utf8: bytes) -> None:
        self._found.update(self._finder.find([utf8])[:, 1].tolist())

    def finish(self) -> npt.NDArray[np.int32]:
        """Returns the numbers of the 13-grams in the text, sorted, shape (K,)."""
        self._take(self._held)
        return np.array(sorted(self._found), dtype=np.int32)


def _words(documents: Sequence[bytes]) -> _Words:
    """Finds the words of documents, none of which reaches over a document's end."""
    text = b"\n".join(documents)
    content = _lower(text)
    is_word = np.zeros(len(content) + 2, dtype=np.bool_)
    np.not_equal(np.frombuffer(content, np.uint8), 0, out=is_word[1:-1])
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    lengths = np.array([len(each) + 1 for each in documents], dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    return _Words(content + bytes(8), edges[0::2], edges[1::2], begins)


def _lower(utf8: bytes) -> bytes:
    """Returns a text with ASCII letters in lower case, and 0 for each byte that is no part of a word."""
    content = utf8.translate(_TABLE)
    return content if utf8.isascii() else _without_other_marks(content)


@functools.cache
def _is_word_character() -> npt.NDArray[np.bool_]:
    """Whether each character is part of a word."""
    return np.array([unicodedata.category(chr(code))[0] in "LMN" for code in range(sys.maxunicode + 1)])


def _without_other_marks(content: bytes) -> bytes:
    """Sets the characters above ASCII that are no part of a word to 0."""
    data = np.frombuffer(content + bytes(3), dtype=np.uint8).copy()
    leads = np.flatnonzero(data >= 0xC0)
    first, second, third, fourth = (data[leads + offset].astype(np.int32) for offset in range(4))
    second, third, fourth = second & 63, third & 63, fourth & 63
    two, three = first < 0xE0, first < 0xF0
    code = np.where(
        two,
        (first & 31) << 6 | second,
        np.where(
            three, (first & 15) << 12 | second << 6 | third, (first & 7) << 18 | second << 12 | third << 6 | fourth
        ),
    )
    outside = ~_is_word_character()[code]
    for offset in range(4):
        size = np.where(two, 2, np.where(three, 3, 4))
        data[leads[outside & (size > offset)] + offset] = 0
    return data[: len(content)].tobytes()


def _mixed(values: Hashes) -> Hashes:
    """Spreads each value over all bits, in place."""
    values ^= values >> np.uint64(32)
    values *= np.uint64(0xD6E8FEB86659FD93)
    values ^= values >> np.uint64(29)
    return values


def _word_hashes(words: _Words) -> Hashes:
    """Returns a 64-bit hash of each word: of its bytes, eight at a time."""
    count = len(words.content) - 7
    eight_from = np.ndarray((count,), dtype="<u8", buffer=words.content, strides=(1,))
    sizes = words.ends - words.starts
    hashes = _mixed(eight_from[words.starts] & _MASKS[np.minimum(sizes, 8)])
    for index in np.flatnonzero(sizes > _LONG_WORD).tolist():
        word = words.content[words.starts[index] : words.ends[index]]
        hashes[index] = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
    longer = np.flatnonzero((sizes > 8) & (sizes <= _LONG_WORD))
    offset = 8
    while longer.size:
        part = eight_from[words.starts[longer] + offset] & _MASKS[np.minimum(sizes[longer] - offset, 8)]
        hashes[longer] = _mixed(hashes[longer] * np.uint64(_BASE) + part)
        offset += 8
        longer = longer[sizes[longer] > offset]
    return hashes


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Returns the powers 0 … count-1 of `_BASE` and of its inverse modulo 2^64."""
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.full(count, base, dtype=np.uint64)
        powers[0] = 1
        found.append(np.multiply.accumulate(powers))
    return found[0], found[1]


def _gram_hashes(words: _Words) -> Hashes:
    """Returns the hash of the 13 words from each word on, shape (max(0, W - 12),).

    The hash of w_0 … w_12 is Σ h(w_k) · base^k. All are differences of one running sum, each divided by the power of its
    first word. A 13-gram may reach over a document's end; the caller compares the documents of both ends.
    """
    if words.starts.size < N:
        return np.zeros(0, dtype=np.uint64)
    hashes = _word_hashes(words)
    power, inverse = (each[: hashes.size] for each in _powers(1 << (hashes.size - 1).bit_length()))
    total = np.zeros(hashes.size + 1, dtype=np.uint64)
    np.cumsum(hashes * power, out=total[1:])
    return _mixed((total[N:] - total[:-N]) * inverse[: hashes.size - N + 1])
