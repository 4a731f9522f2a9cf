"""Text from files of unknown origin: shows the characters that a terminal or a page would obey instead of showing."""

from __future__ import annotations

import os
import unicodedata
from typing import Any


def plain(text: str, *, keep: str = "") -> str:
    r"""Replaces control characters and invisible characters by their Python escapes.

    Control characters are a line end, and ESC, which changes colours and window titles. Marks that reverse the direction
    of text are replaced too, and halves of surrogate pairs, which cannot be written to UTF-8 files.

    Args:
        text: any text.
        keep: characters to leave as they are, such as "\n".

    >>> print(plain("lion\x1b[31m\nNEW LINE"))
    lion\x1b[31m\nNEW LINE
    """
    if text.isprintable():
        return text
    return "".join(
        # Wide and unbreakable spaces (Zs) are not printable to Python, but harmless.
        char if char.isprintable() or char in keep or unicodedata.category(char) == "Zs" else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def plain_tree(value: Any) -> Any:
    r"""Applies `plain` to every text in nested lists and dictionaries, keys included.

    >>> plain_tree({"name\n": ["a\x07", 1]})
    {'name\\n': ['a\\x07', 1]}
    """
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain_tree(key): plain_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_tree(item) for item in value]
    return value


def is_file_name(name: Any) -> bool:
    """Whether a value that came from a file can name an entry of a folder, whatever folder it is joined with.

    Returns:
        False for a path, for the folder itself and its parent, for a control character, which would change the terminal
        that shows it, and for more than the 255 bytes that file systems allow.

    >>> is_file_name("step_1"), is_file_name("../step_1"), is_file_name(".."), is_file_name("a\\n"), is_file_name(1)
    (True, False, False, False, False)
    """
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable():
        return False
    return len(os.fsencode(name)) <= 255
