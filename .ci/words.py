"""Fails if a comment, docstring or message of the code contains a word that the style rejects.

    python .ci/words.py [FILE ...]

Without arguments it checks the Python, shell and Markdown files and the configs of the repository. In a Python
file it checks comments and string literals, but not the names of variables. It checks any other file as a whole.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_lion", "data_prep", "benchmarks", "tests", "launch", "docs", "configs", ".ci")
SUFFIXES = ("", ".py", ".sh", ".sbatch", ".md", ".yaml")  # a script of .ci has no suffix
# These two files contain the words as data.
EXCEPT = (".ci/words.py", "tests/test_words.py")
# A phrase may be wrapped in a comment: its words may be separated by a line break and a '#'.
WORDS = re.compile(r"\b(told|tells|heed|mend|anew|none[\s#]+where|so[\s#]+that[\s#]+only)\b", re.IGNORECASE)
STRINGS = {tokenize.STRING, tokenize.FSTRING_MIDDLE}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each comment or string; comments on consecutive lines are one text."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != first + len(block):
                yield first, "\n".join(block)
                block = []
            first = first if block else token.start[0]
            block.append(token.string)
        elif token.type in STRINGS:
            yield token.start[0], token.string
    if block:
        yield first, "\n".join(block)


def findings(path: Path) -> list[tuple[int, str]]:
    """(line number, word) of each rejected word in a file."""
    return [
        (first + text.count("\n", 0, match.start()), " ".join(match[0].replace("#", " ").split()))
        for first, text in sorted(texts(path))
        for match in WORDS.finditer(text)
    ]


def sources() -> list[Path]:
    """The files that are read without arguments."""
    return [
        path
        for path in [
            *sorted(REPO.glob("*.md")),
            *(path for name in FOLDERS for path in sorted((REPO / name).rglob("*"))),
        ]
        if path.is_file()
        and path.suffix in SUFFIXES
        and "results" not in path.parts
        and path.relative_to(REPO).as_posix() not in EXCEPT
    ]


def main(arguments: list[str]) -> int:
    count = 0
    for path in [Path(name) for name in arguments] or sources():
        shown = path.relative_to(REPO) if path.is_relative_to(REPO) else path
        for line, word in findings(path):
            print(f"{shown}:{line}: {word!r}: use plainer words (report, log, raise, fix, again; None if ...)")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
