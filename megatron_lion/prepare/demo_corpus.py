"""Collects a small English corpus for the demo from installed Python packages, without a download.

Training text: docstrings of Python's standard library and of three packages that this project depends on (numpy,
networkx, matplotlib), read from their source files without importing them. Held-out text of another kind, not used in
training: the language reference's topics that Python's `help()` shows. The same versions give the same corpus.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lion.errors import ConfigError, EnvironmentFault
from megatron_lion.files import storage_errors, write_whole

PACKAGES = ("numpy", "networkx", "matplotlib")
MAX_TRAIN_BYTES = 6_000_000
DOCUMENT_CHARACTERS = 2000

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "_vendor", "pydoc_data"}
_FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "the a an of to is in and or for that this be by with it as are from not if on which")
)
_WORD = re.compile(r"[A-Za-z']+")


@dataclass(frozen=True)
class DemoCorpus:
    """Files and sizes of the demo's corpus.

    Attributes:
        train: path of the training text, JSON lines with a `text` field.
        held_out: path of the plain text for zero-shot evaluation; none of its lines of 40 or more characters is in
            `train`.
        documents: number of documents in `train`.
        train_bytes, held_out_bytes: sizes of the text in bytes of UTF-8.
    """

    train: Path
    held_out: Path
    documents: int
    train_bytes: int
    held_out_bytes: int


def build_demo_corpus(folder: str | Path, max_train_bytes: int = MAX_TRAIN_BYTES) -> DemoCorpus:
    """Writes the demo's corpus into `folder`: train.jsonl and held_out.txt.

    Args:
        folder: output folder; created if it does not exist.
        max_train_bytes: size in bytes at which collecting training text stops.

    Raises:
        ConfigError: the folder has one of the files with other content, which is not replaced.
        EnvironmentFault: this Python has no source files or no help topics.
        StorageError: the folder cannot be written or read.
    """
    folder = Path(folder)
    held_out = held_out_text()
    forbidden = {line for line in map(str.strip, held_out.split("\n")) if len(line) >= 40}
    documents: list[str] = []
    size = 0
    for document in _documents(_docstrings(), forbidden):
        documents.append(document)
        size += len(document.encode("utf-8"))
        if size >= max_train_bytes:
            break
    with storage_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    corpus = DemoCorpus(
        train=folder / "train.jsonl",
        held_out=folder / "held_out.txt",
        documents=len(documents),
        train_bytes=size,
        held_out_bytes=len(held_out.encode("utf-8")),
    )
    contents = {
        corpus.train: "".join(json.dumps({"text": text}) + "\n" for text in documents).encode("ascii"),
        corpus.held_out: held_out.encode("utf-8"),
    }
    for path, content in contents.items():
        with storage_errors(path, "read"):
            if path.exists() and path.read_bytes() != content:
                raise ConfigError(f"{path}: exists with other content; choose another folder, or remove the file")
    for path, content in contents.items():
        write_whole(path, content)
    return corpus


def held_out_text() -> str:
    """Returns the language reference's topics, sorted by name, without duplicates.

    Raises:
        EnvironmentFault: this Python has no help topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EnvironmentFault(
            f"{sys.executable}: this Python lacks the module pydoc_data, whose text the demo evaluates on; "
            "use a Python from python.org or your system's full package"
        ) from None
    distinct = dict.fromkeys(topics[name].strip() for name in sorted(topics))
    return "\n\n".join(distinct) + "\n"


def _roots() -> list[Path]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(next(iter(spec.submodule_search_locations))))
    return roots


def _docstrings() -> Iterator[list[str]]:
    """Yields the docstrings of each source file, in order; files are sorted by path for a reproducible corpus."""
    found = False
    for root in _roots():
        for path in sorted(root.rglob("*.py")):
            if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
                found = True
                yield _docstrings_of(path)
    if not found:
        raise EnvironmentFault(f"{_roots()[0]}: no source files of Python's standard library, which the demo reads")


def _docstrings_of(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarnings about invalid escapes in third-party code
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates and files for other versions
            return []
    texts: list[str] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
        # Definitions occur in the bodies of statements only, so expressions are not walked.
        inner = [*getattr(node, "body", ()), *getattr(node, "orelse", ()), *getattr(node, "handlers", ())]
        pending += reversed([child for child in inner if isinstance(child, ast.stmt | ast.excepthandler)])
    return [text for text in texts if text]


def _documents(files: Iterator[list[str]], forbidden: set[str]) -> Iterator[str]:
    """Joins a file's prose docstrings into documents of about 2,000 characters, without duplicate docstrings."""
    seen: set[str] = set()
    for docstrings in files:
        parts: list[str] = []
        for docstring in docstrings:
            lines = (line.rstrip() for line in docstring.split("\n"))
            text = "\n".join(line for line in lines if not line.lstrip().startswith((">>>", "..."))).strip()
            if text in seen or not is_prose(text) or not forbidden.isdisjoint(map(str.strip, text.split("\n"))):
                continue
            seen.add(text)
            parts.append(text)
            if sum(map(len, parts)) >= DOCUMENT_CHARACTERS:
                yield "\n\n".join(parts)
                parts = []
        if parts:
            yield "\n\n".join(parts)


def is_prose(text: str) -> bool:
    """Whether a text consists of English sentences rather than code or a table.

    It needs at least 12 words, four fifths of its characters must be letters or blanks, and a sixth of its words must
    be common English function words.

    >>> is_prose("The size of the buffer is given in bytes, and it has to be a multiple of the page size.")
    True
    >>> is_prose("usage: [-h] [--foo FOO] bar.py {1,2,3} x=1 y=2 z=3 a b c d e f g h i j k l")
    False
    """
    words = _WORD.findall(text)
    if len(words) < 12 or not text.isascii():
        return False
    letters = sum(character.isalpha() or character in " \n" for character in text)
    common = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return letters >= 0.8 * len(text) and common >= len(words) / 6
