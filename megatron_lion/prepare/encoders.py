"""Encodes batches of text to arrays of token ids, with `tokenizers` or the faster gigatoken.

`tokenizers` is the reference. gigatoken gives the same ids about a hundred times as fast. It is compared with the
reference on difficult texts before its first use, and on a sample of the documents during the preparation; the first
difference ends the preparation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError, EnvironmentFault
from megatron_lion.prepare.encoded import EncodedDocument
from megatron_lion.prepare.long_texts import cut_text, divides_at_blanks
from megatron_lion.prepare.sentence_encoder import SentenceEncoder
from megatron_lion.prepare.sentences import SplitterName

logger = logging.getLogger(__name__)

EncoderName = Literal["auto", "tokenizers", "gigatoken"]

# gigatoken caches every word it has encoded. Rebuilding it after 512 MiB of text limits a worker to about 1 GB.
_RENEW_BYTES = 1 << 29
# One document in 4,096 is also encoded by the reference, which takes about a hundred times as long: 2 to 3 % of the time.
_SAMPLE_EVERY = 4096

_REMEDY = "; use --encoder tokenizers"

HARD_TEXTS = (
    "don't WE'LL it's I'D ’s 'S 1,234.56 ２３ ½ Ⅷ ३४ x²",
    " leading,  two   three \t tab\n\n\n newlines \r\n carriage \x0b\x0c\x1c\x85\xa0\u2028\u2029\u3000 spaces   ",
    "naïve café Ångström Å ﬁ ǅ ʰ ́combining Straße İstanbul",
    "日本語 한국어 ไทย हिन्दी עברית العربية ኢትዮጵያ 𓀀 𝔘𝔫𝔦",
    "👩\u200d👩\u200d👧 🇫🇷 👍🏽 ☎️ 1️⃣ \ufeff \u200b \ufdd0 \ue000 \U0010ffff \x00\x01\x7f",
    "<|endoftext|> <|endoftext|><|im_start|> </s> [CLS] <unk>",
    "a" * 3000 + " " * 3000 + "!?" * 500 + "\n" * 500,
    "def f(x):\n\treturn {'a': [1, 2.0e-3], **x}  # ~!@#$%^&*()_+`-=[]\\{}|;':\",./<>?",
)


class Encoder(Protocol):
    """Interface of an encoder for batches of documents; `name` contains the library and its version."""

    name: str

    def encode_documents(self, texts: Sequence[bytes]) -> list[EncodedDocument]:
        """Returns the ids of each text, given in UTF-8, without special tokens."""


class _WholeDocuments:
    """Base of encoders that store each document as one sequence."""

    def encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[bytes]) -> list[EncodedDocument]:
        """Returns the ids of each text, given in UTF-8, without special tokens."""
        return [EncodedDocument(ids) for ids in self.encode(texts)]


class ReferenceEncoder(_WholeDocuments):
    """Encoder that uses the `tokenizers` library through `Tokenizer`, for long texts in parts if the ids stay equal."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')}"
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._in_parts = divides_at_blanks(tokenizer.definition)

    def encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        """Returns the token ids of each text, given in UTF-8, arrays of shape (N,)."""
        decoded = [text.decode("utf-8") for text in texts]
        parts = [list(cut_text(text)) if self._in_parts else [text] for text in decoded]
        if all(len(each) == 1 for each in parts):
            return self._encode(decoded)
        return [np.concatenate([self._encode([part])[0] for part in each]) for each in parts]

    def _encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return [np.array(ids, dtype=self._dtype) for ids in self._tokenizer.encode_batch(texts)]


class GigatokenEncoder(_WholeDocuments):
    """gigatoken's byte-level BPE on the calling thread, compared with the reference on a sample.

    Args:
        tokenizer: tokenizer to encode with.
        sample_every: the reference also encodes one document in this many.
        compared: whether another process has compared it with the reference before its first use. The reference, which is
            then built at the first sample, is used half of `sample_every` documents later.

    Raises:
        EnvironmentFault: gigatoken is not installed or does not support this tokenizer.
        DataError: gigatoken gives other ids than the reference.
    """

    def __init__(self, tokenizer: Tokenizer, sample_every: int = _SAMPLE_EVERY, compared: bool = False) -> None:
        self.name = f"gigatoken {_gigatoken_version()}"
        self._reference = ReferenceEncoder(tokenizer)
        self._source = tokenizer.source
        definition = tokenizer.definition
        if not all(token["special"] for token in definition["added_tokens"]):
            # Where added tokens overlap, or have flags such as `single_word`, version 0.10 finds others than the reference.
            raise EnvironmentFault(f"{self._source}: has added tokens, so gigatoken is not used{_REMEDY}")
        # gigatoken would encode a marker inside a document as the special id; `Tokenizer` encodes it as text.
        self._definition = json.dumps({**definition, "added_tokens": []})
        self._sample_every = sample_every
        self._seen = sample_every // 2 if compared else 0
        self._renew()
        if compared:
            return
        hard = [text.encode("utf-8") for text in HARD_TEXTS]
        for text, expected in zip(hard, self._reference.encode(hard), strict=True):
            self._compare(text, self._backend.encode(text), expected)

    def _renew(self) -> None:
        try:
            self._backend = importlib.import_module("gigatoken.gigatoken_rs").load_hf_json(self._definition)
        except Exception as error:  # the library raises its own, undocumented classes
            raise EnvironmentFault(
                f"{self._source}: gigatoken does not support this tokenizer ({error}){_REMEDY}"
            ) from None
        self._bytes = 0

    def _compare(self, text: bytes, ids: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        if not np.array_equal(ids, expected):
            raise DataError(
                f"{self._source}: gigatoken and tokenizers give different ids for the text that begins {text.decode()[:40]!r}"
                f"{_REMEDY}"
            )

    def encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        """Returns the token ids of each text, given in UTF-8; the reference checks every `sample_every`-th."""
        # From bytes, the library takes half the time that it takes from str, which it copies to UTF-8 first.
        found = [self._backend.encode(text) for text in texts]
        # Counted over all batches, so that small batches are sampled too.
        first = -self._seen % self._sample_every
        sample = list(range(first, len(texts), self._sample_every))
        for index, expected in zip(sample, self._reference.encode([texts[i] for i in sample]), strict=True):
            self._compare(texts[index], found[index], expected)
        self._seen += len(texts)
        self._bytes += sum(map(len, texts))
        if self._bytes > _RENEW_BYTES:
            self._renew()
        return found


def _gigatoken_version() -> str:
    try:
        return importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(f"gigatoken is not installed: pip install gigatoken{_REMEDY}") from None


def build_encoder(
    name: EncoderName, tokenizer: Tokenizer, splitter: SplitterName | None = None, compared: bool = False
) -> Encoder:
    """Builds the encoder of a name; "auto" uses gigatoken if it is installed and supports the tokenizer.

    Args:
        name: "auto", "tokenizers" or "gigatoken"; ignored if a splitter is given.
        tokenizer: tokenizer to encode with.
        splitter: splitter that divides documents into sentences, as BERT needs; None keeps each document whole.
        compared: as for `GigatokenEncoder`.

    Raises:
        EnvironmentFault: gigatoken or punkt was requested and cannot be used.
        DataError: the tokenizer is not suitable for BERT.
    """
    if splitter is not None:
        return SentenceEncoder(tokenizer, splitter)
    if name == "tokenizers":
        return ReferenceEncoder(tokenizer)
    try:
        return GigatokenEncoder(tokenizer, compared=compared)
    except (EnvironmentFault, DataError) as error:
        if name == "gigatoken":
            raise
        logger.info("%s; tokenizers encodes instead, many times slower", str(error).removesuffix(_REMEDY))
        return ReferenceEncoder(tokenizer)
