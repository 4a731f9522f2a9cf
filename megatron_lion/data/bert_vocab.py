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
        DataError: the file is not UTF-8, has a token twice, or no continuation pieces (##…).
    """
    try:
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; is this the right file?") from None
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines):
        token = line.rstrip("\r")
        # Versions of transformers differ in whether such blanks belong to the token. A token of blanks alone is never used.
        if token.strip() and token != token.rstrip():
            raise DataError(f"{where}: line {index + 1}: {token!r} ends in a blank; remove it in a copy of the file")
        if token in vocab:
            raise DataError(
                f"{where}: line {index + 1}: {token!r} is also line {vocab[token] + 1}; each token needs one line"
            )
        vocab[token] = index
    if not any(token.startswith("##") for token in vocab):
        raise DataError(f"{where}: no line begins with ##; is this a WordPiece vocabulary (one token a line)?")
    return vocab


def is_cased(vocab: dict[str, int]) -> bool:
    """Whether a vocabulary has capital letters, not counting tokens in square brackets such as [UNK].

    >>> is_cased({"[UNK]": 0, "the": 1, "##s": 2}), is_cased({"[UNK]": 0, "The": 1})
    (False, True)
    """
    return any(token != token.lower() for token in vocab if not (token.startswith("[") and token.endswith("]")))


def special_tokens(vocab: dict[str, int]) -> list[dict[str, Any]]:
    """Returns BERT's special tokens that the vocabulary contains, as `added_tokens` of a tokenizer.json."""
    return [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for token in SPECIAL_TOKENS if token in vocab
    ]  # fmt: skip


def wordpiece_definition(
    vocab: dict[str, int], *, lowercase: bool, added: list[dict[str, Any]], strip_accents: bool | None = None,
    chinese_characters: bool = True, unknown: str = "[UNK]",
) -> dict[str, Any]:  # fmt: skip
    """Returns BERT's tokenizer as a tokenizer.json document.

    It drops control characters and makes each punctuation mark a word.

    Args:
        vocab: dictionary from `parse_wordpieces`.
        lowercase: true for an uncased vocabulary.
        added: special and added tokens, as `added_tokens` of a tokenizer.json.
        strip_accents: whether accents are removed; None removes them if `lowercase` is true.
        chinese_characters: whether each Chinese character is a word.
        unknown: token that replaces a word outside the vocabulary.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": chinese_characters,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": vocab,
        },
    }
