"""Splits documents into sentences and encodes them with WordPiece; each distinct word is tokenized once.

BERT's tokenization of a text is the tokenization of its blank-separated words one after another. So a table from words
to ids replaces the tokenizer for most text. `tokenizers` is the reference: it encodes words that are not in the table,
and documents with control characters (BERT drops these, which joins the words around them). One document in 512 is
encoded both ways and compared.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError
from megatron_lion.prepare.encoded import EncodedDocument
from megatron_lion.prepare.sentences import SplitterName, load_splitter

LONGEST_SENTENCE = 512
"""Megatron's dataset skips every document with a longer sentence (LONG_SENTENCE_LEN), so longer ones are divided."""

# An entry takes about 150 bytes, so the table of a worker takes at most about 300 MB.
_TABLE_WORDS = 1 << 21
_SAMPLE_EVERY = 512
_ASCII_PARTS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")
# str.split treats these as white space, BERT as control characters, so the table would give other ids.
_DROPPED = frozenset("\x0b\x0c\x1c\x1d\x1e\x1f\x85")


class _WordTable(dict[str, bytes]):
    """Maps a word to the bytes of its ids; a missing word is tokenized and added."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self._encode = tokenizer.backend.encode
        self._lowercase = bool((tokenizer.definition.get("normalizer") or {}).get("lowercase"))
        self._dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ids = self._learn(word)
        if len(self) >= _TABLE_WORDS:
            self.clear()  # frequent words return at once; no bookkeeping of uses is needed
        self[word] = ids
        return ids

    def _learn(self, word: str) -> bytes:
        """Encodes a word. Printable ASCII is first cut at punctuation and lowercased, which finds more words in the table."""
        if word.isascii() and word.isprintable():
            parts = _ASCII_PARTS.findall(word)
            if len(parts) > 1:
                return b"".join(map(self.__getitem__, parts))
            if self._lowercase and not word.islower() and word.isalpha():
                return self[word.lower()]
        return np.array(self._encode(word, add_special_tokens=False).ids, dtype=self._dtype).tobytes()


class SentenceEncoder:
    """Splits documents into sentences and encodes these with BERT's WordPiece.

    Args:
        tokenizer: WordPiece tokenizer with BERT's special tokens.
        splitter: sentence splitter, "rules" or "punkt".
        sample_every: the reference also encodes one document in this many.

    Raises:
        DataError: the tokenizer is no WordPiece or lacks special tokens.
        EnvironmentFault: punkt is not installed.
    """

    def __init__(
        self, tokenizer: Tokenizer, splitter: SplitterName = "rules", sample_every: int = _SAMPLE_EVERY
    ) -> None:
        tokenizer.bert_special_ids()  # raises DataError if the tokenizer is not suitable
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')} by words, sentences by {splitter}"
        self.split = load_splitter(splitter)
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._continues = _continuation_ids(tokenizer)
        self._table = _WordTable(tokenizer, self._dtype)
        self._sample_every = sample_every
        self._seen = 0

    def encode_documents(self, texts: Sequence[bytes]) -> list[EncodedDocument]:
        """Returns the ids and sentence lengths of each text, given in UTF-8; a text without tokens has no sentences."""
        documents = []
        for utf8 in texts:
            text = utf8.decode("utf-8")
            sentences = self.split(text)
            plain = _DROPPED.isdisjoint(text)
            encoded = self._by_words(sentences) if plain else self._by_reference(sentences)
            if plain and self._seen % self._sample_every == 0:
                self._compare(text, encoded, self._by_reference(sentences))
            self._seen += 1
            documents.append(self._document(encoded))
        return documents

    def _by_words(self, sentences: Sequence[str]) -> list[bytes]:
        lookup = self._table.__getitem__
        return [b"".join(map(lookup, sentence.split())) for sentence in sentences]

    def _by_reference(self, sentences: Sequence[str]) -> list[bytes]:
        return [np.array(ids, dtype=self._dtype).tobytes() for ids in self._tokenizer.encode_batch(sentences)]

    def _compare(self, text: str, found: list[bytes], expected: list[bytes]) -> None:
        if found != expected:
            raise DataError(
                f"{self._tokenizer.source}: encoding by words and the tokenizer give different ids for the text that begins "
                f"{text[:40]!r}; please report this tokenizer"
            )

    def _document(self, sentences: list[bytes]) -> EncodedDocument:
        lengths = np.array([len(ids) for ids in sentences], dtype=np.int32) // self._dtype.itemsize
        ids = np.frombuffer(b"".join(sentences), dtype=self._dtype)
        long = int((lengths > LONGEST_SENTENCE).sum())
        if long:
            lengths = self._divide(ids, lengths)
        return EncodedDocument(ids, lengths[lengths > 0], long)

    def _divide(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Returns the lengths with long sentences cut into at most `LONGEST_SENTENCE` tokens, at beginnings of words."""
        divided: list[int] = []
        start = 0
        for length in lengths.tolist():
            end = start + length
            while end - start > LONGEST_SENTENCE:
                begins = np.flatnonzero(~self._continues[ids[start + 1 : start + LONGEST_SENTENCE + 1]])
                cut = int(begins[-1]) + 1 if begins.size else LONGEST_SENTENCE
                divided.append(cut)
                start += cut
            divided.append(end - start)
            start = end
        return np.array(divided, dtype=np.int32)


def _continuation_ids(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Returns a (V,) array that is true for ids of continuation pieces (##…)."""
    continues = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    continues[[index for token, index in tokenizer.backend.get_vocab().items() if token.startswith("##")]] = True
    return continues
