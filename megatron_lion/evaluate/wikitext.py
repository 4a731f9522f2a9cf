"""Reads WikiText for evaluation: recognises the file, detokenises its text and counts its words.

WikiText is distributed with blanks between its words (`a guest @-@ starring role , which`). Published
zero-shot perplexities undo that before they encode the text, but divide by the number of *original* words.
A number without its text version and its counts is therefore not comparable with any other.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import DataError
from megatron_lion.evaluate.known_texts import UNKNOWN, WIKITEXT
from megatron_lion.evaluate.text_rows import read_all_documents, read_rows
from megatron_lion.prepare.find_files import input_file, kind_of
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BOM


def _inside(opening: str, closing: str) -> tuple[re.Pattern[str], str]:
    """Returns the rule that removes blanks just inside a pair of brackets or quotes; pairs do not nest."""
    body = rf"\s*([^{re.escape(closing)}]*?)\s*"
    return re.compile(re.escape(opening) + body + re.escape(closing)), rf"{opening}\1{closing}"


# The order is part of the convention: each rule reads the result of the rules before it.
_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_inside(opening, closing) for opening, closing in ("()", "[]", "{}", '""', "''")),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(text: str) -> str:
    r"""Returns WikiText's blank-separated words as running text, as Megatron's zero-shot evaluation does.

    The rules, in order: `s '` closes a plural possessive; ` @-@ `, ` @,@ ` and ` @.@ ` lose their marks; the blanks
    before `: ; . ! ? ,` and just inside `() [] {} "" ''` are removed; runs of `=` are joined; ` ° ` loses its blanks;
    the blanks at both ends of a line are removed; ` N ` becomes ` 1 `; ` 's` joins its word. It is not invertible.

    Args:
        text: the text of the file, not stripped.

    Returns:
        The text to encode.

    >>> detokenize(' = = Early life = = \n He had a " guest @-@ starring " role , in 1 @,@ 000 plays . \n')
    ' == Early life ==\nHe had a "guest-starring" role, in 1,000 plays.\n'

    Source: the convention of Megatron-LM's WikiText-103 evaluation (Shoeybi et al. 2019, section 5.2).
    """
    for pattern, replacement in _RULES:
        text = text.replace(pattern, replacement) if isinstance(pattern, str) else pattern.sub(replacement, text)
    return text


def count_original_tokens(text: str) -> int:
    r"""Counts the words of the original text as Megatron does: pieces between single blanks.

    A line break is no blank. The last word of a line and the first of the next are two words only because WikiText
    has blanks around the break, and an empty line counts as one word. wiki.test.tokens of WikiText-103 has 245,566.

    >>> count_original_tokens(" \n = Title = \n \n A word . \n ")
    8
    """
    return len(text.strip().split(" "))


def count_harness_words(text: str) -> int:
    r"""Counts words as lm-evaluation-harness does: pieces between runs of white space, with empty pieces at both ends.

    >>> count_harness_words(" = Title = \n \n A word . \n ")
    8
    """
    return len(re.split(r"\s+", text))


def split_pages(text: str) -> list[str]:
    r"""Splits WikiText at its first-level headings, like the document-level edition that the harness reads.

    A page starts at a line that reads `= ... =` after runs of `=` are joined. Blank pages are omitted. The raw test
    file has 60 articles but 62 pages: two body lines look like headings, and lm-evaluation-harness splits there too.

    >>> split_pages(" \n = One = \n \n = = Part = = \n text \n = Two = \n more \n")
    [' = One = \n \n = = Part = = \n text ', ' = Two = \n more \n']
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A text to score, with the facts that make a perplexity on it comparable.

    Attributes:
        kind: "wikitext103" (detokenised before encoding) or "text" (encoded without changes).
        path: the file.
        sha256: SHA-256 of the text's UTF-8 bytes without a byte-order mark; for documents, of their list as JSON.
        version: name of the published file, or "unknown".
        original: the text of the file.
        encoded: the text that the tokenizer encodes if `documents` is None.
        n_orig: number of original words: `count_original_tokens` for WikiText, white-space words otherwise.
        documents: the documents of a JSON or table file; None if the file is one text.
    """

    kind: str
    path: str
    sha256: str
    version: str
    original: str
    encoded: str
    n_orig: int
    documents: tuple[str, ...] | None = None


def check_is_file(path: str | Path) -> None:
    """Raises DataError if a text is missing or is a folder."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder was given; give a UTF-8 text file")
    if not path.exists():
        raise DataError(f"{path}: no such text file; give the path of a UTF-8 text")


def read_text(path: str | Path, kind: str, json_key: str = "text") -> EvaluationText:
    """Reads a text for evaluation and recognises it by its hash.

    Under "text", JSON, Parquet and Arrow files are read as documents, as `prepare` reads them. Under "wikitext103" each
    row of such a file is a line with its line break, and the row of a blank line is empty, as on the Hugging Face hub;
    the rows are joined to the original text. A byte-order mark is dropped.

    Args:
        path: a UTF-8 text or JSON file, plain or compressed, or a Parquet or Arrow file.
        kind: "wikitext103" to detokenise it by Megatron's convention, "text" to leave it unchanged.
        json_key: key or column of the text.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or has fewer than two words; or a line of it is bad.
        EnvironmentFault: a package for the format is not installed.
    """
    path = Path(path)
    check_is_file(path)
    format, _ = kind_of(path) or ("txt", "")
    documents: tuple[str, ...] | None = None
    if format == "txt":
        content = _content(path).removeprefix(BOM)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None
    elif kind == "wikitext103":
        text = _join_rows(path, json_key)
        content = text.encode("utf-8")
    else:
        documents = tuple(read_all_documents(input_file(path), json_key))
        text = "\n".join(documents)
        # The hash covers the documents, because the bytes of a file do not determine which key was read.
        content = json.dumps(documents).encode()
    n_orig = count_original_tokens(text) if kind == "wikitext103" else len(text.split())
    if n_orig < 2:
        raise DataError(f"{path}: the text is empty or a single word; perplexity needs at least two words")
    sha256 = hashlib.sha256(content).hexdigest()
    return EvaluationText(
        kind=kind,
        path=str(path),
        sha256=sha256,
        version=WIKITEXT.get(sha256, UNKNOWN),
        original=text,
        encoded=detokenize(text) if kind == "wikitext103" else text,
        n_orig=n_orig,
        documents=documents,
    )


def _content(path: Path) -> bytes:
    """Returns the decompressed bytes of a file."""
    with reading(path), opened(input_file(path, "txt")) as (stream, _):
        return stream.read()


def _join_rows(path: Path, key: str) -> str:
    """Returns the text whose lines are the rows of a file.

    Raises:
        DataError: a row before the last one does not end in a line break: joined, the words at its ends would be one.
    """
    lines: list[str] = []
    last = ""
    for where, row in read_rows(input_file(path), key):
        if lines and not lines[-1].endswith("\n"):
            raise DataError(
                f"{last}: {key!r} does not end in a line break; --wikitext103 needs a line of the text in each row, with its line "
                "break, as on the Hugging Face hub; give such a file, or the text file"
            )
        lines.append(row or " \n")
        last = where
    return "".join(lines)
