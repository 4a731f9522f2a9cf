"""Extracts the text from one line of JSON or one row of a table, and classifies bad lines.

The rules, and the kind under which a line that breaks each is counted:

- bytes are strict UTF-8 (`not_utf8`); nothing is normalised, replaced or stripped;
- a byte-order mark may begin a file, but no later line (`byte_order_mark`);
- the line is one JSON value with nothing after it (`not_json`), nested at most 100 deep (`too_deep`);
  NaN, huge numbers and repeated keys are accepted; of equal keys the last counts, as in Python;
- the value is an object (`not_an_object`) with the text's key (`missing_key`), whose value is a string
  (`not_a_string`) without half surrogate pairs (`lone_surrogate`).

A blank line (`blank_line`) and a text of white space only (`empty_document`) are not errors: they are skipped and
counted.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

MAX_DEPTH = 100
BOM = b"\xef\xbb\xbf"

# Numbers in other fields are not used. Parsed as floats they have no limit; Python refuses an int of over 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=float)
_CONTAINERS = frozenset([dict, list])
_JSON_NAMES = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false",
}  # fmt: skip


class BadLine(Exception):
    """Raised for a line that breaks a rule.

    Attributes:
        kind: name under which the line is counted.
        what: description of the error, for a message.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


class Skip(Exception):
    """Raised for a line that is skipped but is no error; `kind` is the name under which it is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def text_of_line(line: bytes, key: str = "text") -> str:
    r"""Returns the document's text in one line of JSON.

    Args:
        line: bytes of the line, with or without its ending (LF or CR LF).
        key: key of the text; a key that the object does not have is divided at its dots and leads into inner objects.

    Raises:
        BadLine: the line breaks one of the module's rules.
        Skip: the line is blank or the document is empty.

    >>> text_of_line(b'{"text": "caf\\u00e9", "id": 7}\r\n')
    'café'
    """
    if not line.strip(b" \t\r\n"):
        raise Skip("blank_line")
    is_unicode = True
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # What orjson accepts, the rules accept with the same strings. It refuses more: NaN, 1e999, half surrogates.
        value, is_unicode = _value_of_line(line), False
    inner = value.values() if isinstance(value, dict) else [value]
    if not _CONTAINERS.isdisjoint(map(type, inner)) and _deeper_than(value, MAX_DEPTH):
        raise BadLine("too_deep", f"nested more than {MAX_DEPTH} deep")
    if not isinstance(value, dict):
        raise BadLine("not_an_object", f'is {_name(value)}; an object {{"{key}": "…"}} is needed')
    found: Any = value
    for name in [key] if key in value else key.split("."):
        if not isinstance(found, dict) or name not in found:
            keys = ", ".join(map(repr, list(value)[:5])) or "none"
            raise BadLine("missing_key", f"no key {key!r} (its keys: {keys}); name the text's key with --json-key")
        found = found[name]
    return checked_text(found, key, is_unicode)


def _value_of_line(line: bytes) -> Any:
    """Returns the value of a line by the rules of the module.

    Raises:
        BadLine: the line is not UTF-8 or not one JSON value.
    """
    try:
        return _DECODER.decode(decode_utf8(line))
    except json.JSONDecodeError as error:
        raise BadLine("not_json", f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadLine("too_deep", f"nested more than {MAX_DEPTH} deep") from None


def decode_utf8(data: bytes) -> str:
    """Decodes strict UTF-8.

    Raises:
        BadLine: the bytes are not UTF-8 or begin with a byte-order mark.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine("not_utf8", f"not UTF-8 at byte {error.start + 1}") from None
    if text.startswith("\ufeff"):
        raise BadLine("byte_order_mark", "begins with a byte-order mark")
    return text


def checked_text(text: Any, key: str, is_unicode: bool = False) -> str:
    """Returns the value of the text's key if it is a usable, non-empty string.

    Args:
        text: value.
        key: its key, for messages.
        is_unicode: whether it is known to have no half of a surrogate pair.

    Raises:
        BadLine: it is no string, or has half of a surrogate pair.
        Skip: it is empty or white space only.
    """
    if not isinstance(text, str):
        raise BadLine("not_a_string", f"{key!r} is {_name(text)}; a string is needed")
    if not text or text.isspace():
        raise Skip("empty_document")
    if is_unicode:
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{key!r} has half of a surrogate pair at character {error.start + 1}"
        raise BadLine("lone_surrogate", what) from None
    return text


def _name(value: Any) -> str:
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether a JSON value is nested deeper than `limit`; iterative, since recursion could overflow the stack."""
    level = [value]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
        if not level:
            return False
    return True
