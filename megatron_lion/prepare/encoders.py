"""Text to arrays of token ids, fast: the plain encoder, and gigatoken where it is installed.

`tokenizers` is the reference. gigatoken (optional: pip install "megatron-lion[fast]") gives the same ids about
fifty times as fast; it is compared with the reference on hard text before it is used and on a
sample of the documents all along, and the first difference ends the preparation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError, EnvironmentFault
from megatron_lion.prepare.encoded import EncodedDocument
from megatron_lion.prepare.sentence_encoder import SentenceEncoder
from megatron_lion.prepare.sentences import SplitterName

EncoderName = Literal["auto", "tokenizers", "gigatoken"]

# gigatoken keeps every word it ever met; starting afresh bounds a worker's memory to about a gigabyte.
_RENEW_BYTES = 1 << 29
# One document in 512 is encoded twice: about a tenth of the time at gigatoken's speed.
_SAMPLE_EVERY = 512

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
    """Encodes batches of documents."""

    name: str

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedDocument]:
        """Each text as ids, nothing added."""


class _WholeDocuments:
    """Documents of one sequence."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedDocument]:
        """Each text as ids, nothing added."""
        return [EncodedDocument(ids) for ids in self.encode(texts)]


class ReferenceEncoder(_WholeDocuments):
    """The `tokenizers` library, as `Tokenizer` uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')}"
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Token ids of each text."""
        return [np.array(ids, dtype=self._dtype) for ids in self._tokenizer.encode_batch(texts)]


class GigatokenEncoder(_WholeDocuments):
    """gigatoken's byte-level BPE on the calling thread, watched by the reference.

    Raises:
        EnvironmentFault: gigatoken is not installed or cannot take this tokenizer.
        DataError: it gives other ids than the reference.
    """

    def __init__(self, tokenizer: Tokenizer, sample_every: int = _SAMPLE_EVERY) -> None:
        self.name = f"gigatoken {_gigatoken_version()}"
        self._reference = ReferenceEncoder(tokenizer)
        self._source = tokenizer.source
        self._dtype = token_dtype(tokenizer.vocab_size)
        definition = tokenizer.definition
        # gigatoken would cut special tokens out of the text; here a marker in a document is text.
        definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["special"]]
        self._definition = json.dumps(definition)
        self._sample_every = sample_every
        self._seen = 0
        self._renew()
        for text, expected in zip(HARD_TEXTS, self._reference.encode(HARD_TEXTS), strict=True):
            self._compare(text, self._backend.encode(text), expected)

    def _renew(self) -> None:
        try:
            self._backend = importlib.import_module("gigatoken.gigatoken_rs").load_hf_json(self._definition)
        except Exception as error:  # the library's own choice of classes
            raise EnvironmentFault(
                f"{self._source}: gigatoken does not take this tokenizer ({error}); use --encoder tokenizers"
            ) from None
        self._bytes = 0

    def _compare(self, text: str, ids: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        if not np.array_equal(ids, expected):
            raise DataError(
                f"{self._source}: gigatoken and tokenizers give different ids for the text that begins {text[:40]!r}; "
                "use --encoder tokenizers"
            )

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Token ids of each text; every `sample_every`-th also by the reference."""
        found = [self._backend.encode(text) for text in texts]
        first = -self._seen % self._sample_every
        sample = list(range(first, len(texts), self._sample_every))
        for index, expected in zip(sample, self._reference.encode([texts[i] for i in sample]), strict=True):
            self._compare(texts[index], found[index], expected)
        self._seen += len(texts)
        self._bytes += sum(map(len, texts))
        if self._bytes > _RENEW_BYTES:
            self._renew()
        return [ids.astype(self._dtype) for ids in found]


def _gigatoken_version() -> str:
    try:
        return importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(
            'encoder gigatoken is not installed: pip install "megatron-lion[fast]", or use --encoder tokenizers'
        ) from None


def build_encoder(name: EncoderName, tokenizer: Tokenizer, splitter: SplitterName | None = None) -> Encoder:
    """The encoder of that name; "auto" takes gigatoken where it is installed and takes the tokenizer.

    Args:
        name: see there; of no effect with a splitter.
        tokenizer: what to encode with.
        splitter: documents become sequences of sentences, as BERT needs them.

    Raises:
        EnvironmentFault: gigatoken or punkt was asked for and cannot be used.
        DataError: the tokenizer is not fit for BERT.
    """
    if splitter is not None:
        return SentenceEncoder(tokenizer, splitter)
    if name == "tokenizers":
        return ReferenceEncoder(tokenizer)
    try:
        return GigatokenEncoder(tokenizer)
    except (EnvironmentFault, DataError):
        if name == "gigatoken":
            raise
        return ReferenceEncoder(tokenizer)
