"""Reads one long document in parts that, encoded one after another, give the ids of the whole.

`tokenizers` needs more than 100 bytes of memory for each byte that it encodes at once. A byte-level BPE with GPT-2's
pattern, and BERT's pre-tokenizer, divide a text into words before they look for tokens, so a text can be cut between
words.
"""

from __future__ import annotations

import codecs
import functools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Protocol

from megatron_lion.prepare.lines import BOM, BadLine

_BLOCK_BYTES = 1 << 16
_PART_CHARACTERS = 1 << 18
# ASCII letters, hiragana, katakana, Chinese characters and hangul that are letters in every version of Unicode, so in
# every implementation of GPT-2's pattern. Combining marks are none.
_LETTER = re.compile("[A-Za-z\u3041-\u3094\u30a1-\u30fa\u30fc-\u30fe\u4e00-\u9fa5\uac00-\ud7a3]")
# Marks and white space before which a word that ends in such a letter ends.
_MARKS = ",.;:!?)，。、；：！？」』）》"
_ENDS_A_WORD = frozenset(_MARKS + " \n\r\u3000")


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Returns up to `size` bytes, or none at the end."""


def divides_at_blanks(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer's words end at every place where `text_parts` cuts a text, so that the parts keep its ids.

    Args:
        definition: the parsed tokenizer.json.
    """
    normalizer, splitter = definition.get("normalizer"), definition.get("pre_tokenizer") or {}
    byte_level = (
        normalizer is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")  # the space would be added to every part
        and splitter.get("use_regex", True)
    )
    bert = (normalizer or {}).get("type") == "BertNormalizer" and splitter.get("type") == "BertPreTokenizer"
    plain = not any(_may_cross_a_cut(token) for token in definition.get("added_tokens") or [])
    return bool(byte_level or bert) and plain


def _may_cross_a_cut(token: dict[str, Any]) -> bool:
    """Whether a cut may change where an added token is found: it includes a cut, or depends on its neighbours.

    Added tokens are searched before the text is divided into words. Special ones are not searched.
    """
    # BERT's normaliser decomposes characters in added tokens too: U+037E becomes a semicolon.
    content = unicodedata.normalize("NFD", token["content"])
    inside = re.search(rf"\s|.[{_MARKS}]", content, re.DOTALL)
    outside = token.get("lstrip") or token.get("rstrip") or (token.get("single_word") and content[:1] in _ENDS_A_WORD)
    return not token.get("special") and bool(inside or outside)


def text_parts(stream: Readable, offset: int = 0) -> Iterator[str]:
    """Yields a text, without a byte-order mark, in parts of about 256 Ki characters.

    A text that cannot be cut anywhere is one part.

    Args:
        stream: the decompressed bytes of the text, from `offset` on.
        offset: position of the stream in its file, where a character begins; a byte-order mark is dropped only at 0.

    Raises:
        BadLine: the text is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[str] = []
    characters = done = 0
    wanted = _PART_CHARACTERS
    for block in iter(functools.partial(stream.read, _BLOCK_BYTES), b""):
        try:
            text = decoder.decode(block.removeprefix(BOM) if offset + done == 0 else block)
        except UnicodeDecodeError:
            first = offset + done
            raise BadLine("not_utf8", f"not UTF-8 between bytes {first + 1} and {first + len(block)}") from None
        done += len(block)
        held.append(text)
        characters += len(text)
        if characters >= wanted:
            whole = "".join(held)
            cut = _last_cut(whole)
            if cut:
                yield whole[:cut]
            held, characters = [whole[cut:]], len(whole) - cut
            # Doubled if there was no cut, so that the time stays linear in the length of the text.
            wanted = _PART_CHARACTERS if cut else 2 * characters
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise BadLine("not_utf8", "ends within a character, so it is not UTF-8 or was cut short") from None
    if rest := "".join(held):
        yield rest


def cut_text(text: str) -> Iterator[str]:
    """Yields a text in parts of about 256 Ki characters, as `text_parts` cuts them; a short text is one part."""
    start, size = 0, _PART_CHARACTERS
    while len(text) - start > 2 * size:
        cut = _last_cut(text[start : start + size])
        if cut:
            yield text[start : start + cut]
        start, size = start + cut, _PART_CHARACTERS if cut else 2 * size
    yield text[start:]


def _last_cut(text: str) -> int:
    """Returns the last position at which the text can be cut, or 0 if there is none in its second half."""
    return next((cut for cut in range(len(text) - 2, len(text) // 2, -1) if _can_cut(text, cut)), 0)


def _can_cut(text: str, cut: int) -> bool:
    """Whether a position is at the end of a word, by one of two rules.

    After a common letter, a word ends before a punctuation mark or white space. Between other printable characters, it
    ends before a single blank, after a single LF and inside CR LF. The last blank of a longer run belongs to the next
    word, so a cut beside the run would change tokens. CR LF is a run too: GPT-2's pattern divides it between the two
    characters unless the text ends there.
    """
    if text[cut] in _ENDS_A_WORD and _LETTER.match(text[cut - 1]):
        return True
    if text[cut] == " ":
        before, after = text[cut - 1], text[cut + 1]
    elif text[cut - 1] == "\n":
        before, after = text[cut - 2], text[cut]
    elif text[cut - 1 : cut + 1] == "\r\n":
        before, after = text[cut - 2], text[cut + 1]
    else:
        return False
    return before.isprintable() and after.isprintable() and not (before.isspace() or after.isspace())
