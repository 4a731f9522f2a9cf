"""Reads and checks BERT's vocab.txt (one WordPiece a line; the line number from 0 is its id)."""

from __future__ import annotations

from typing import Any

from megatron_lion.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARACTERS = 100
"""A longer word is [UNK], as in BERT."""


def parse_wordpieces(data: bytes, where: str) -> dict[str, int]:
    """Parses vocab.txt into a dictionary from token to id.

    Args:
        data: content of the file.
        where: name of the file, for messages.

    Raises:
        DataError: the file is not UTF-8, has a token twice, no continuation pieces (##…), or no [UNK].
    """
    try:
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; is this the right file?") from None
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        token = line.rstrip("\r")
        if token in vocab:
            raise DataError(
                f"{where}: line {index + 1}: {token!r} is also line {vocab[token] + 1}; each token needs one line"
            )
        vocab[token] = index
    if not any(token.startswith("##") for token in vocab):
        raise DataError(f"{where}: no line begins with ##; is this a WordPiece vocabulary (one token a line)?")
    if "[UNK]" not in vocab:
        raise DataError(f"{where}: [UNK] is missing; a BERT vocabulary has {', '.join(SPECIAL_TOKENS)}")
    return vocab


def is_cased(vocab: dict[str, int]) -> bool:
    """Whether a vocabulary has capital letters, not counting tokens in square brackets such as [UNK].

    >>> is_cased({"[UNK]": 0, "the": 1, "##s": 2}), is_cased({"[UNK]": 0, "The": 1})
    (False, True)
    """
    return any(token != token.lower() for token in vocab if not (token.startswith("[") and token.endswith("]")))


def wordpiece_definition(vocab: dict[str, int], *, lowercase: bool) -> dict[str, Any]:
    """BERT's tokenizer as a tokenizer.json document.

    Control characters are dropped. Each Chinese character and each punctuation mark is a word. `lowercase` also strips
    accents.

    Args:
        vocab: dictionary from `parse_wordpieces`.
        lowercase: true for an uncased vocabulary.
    """
    special = [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for token in SPECIAL_TOKENS if token in vocab
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,  # None: as `lowercase`
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": vocab,
        },
    }
