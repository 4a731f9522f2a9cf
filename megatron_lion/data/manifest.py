"""Reads and writes manifest.json of a dataset folder: sources, settings, counts and hashes of the token files.

The manifest is written last, after every file that it names is on the disk, and contains a hash of itself. So a
folder with a readable manifest is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.files import write_whole
from megatron_lion.plain_text import is_file_name

FORMAT = 1
NAME = "manifest.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The pair of token files of one split.

    Attributes:
        prefix: file name without .bin/.idx, inside the dataset folder.
        documents, tokens: counts; the tokens include the end-of-document tokens.
        bin_bytes, idx_bytes: sizes of the two files in bytes.
        bin_sha256, idx_sha256: hashes of the two files.
    """

    prefix: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One input file: its path, size in bytes and hash as stored (before decompression), and its documents."""

    path: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One text whose passages were searched in the corpus: runs of 13 words (`prepare.overlap`).

    Attributes:
        path, bytes, sha256: the file, as in `SourceInfo`.
        documents: number of its documents.
        ngrams: number of its distinct 13-grams.
        found_ngrams: number of those that occur in the documents that were read, in any split or dropped.
        found_in_documents: number of documents that have one.
        train_ngrams, train_documents: the same for the documents of the train split as it was written.
    """

    path: str
    bytes: int
    sha256: str
    documents: int
    ngrams: int
    found_ngrams: int
    found_in_documents: int
    train_ngrams: int
    train_documents: int


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Identity of a tokenizer, compared by training and evaluation: hash, kind, size, end-of-document token."""

    sha256: str
    kind: str
    vocab_size: int
    eod_token: str | None
    eod_id: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a dataset folder.

    Attributes:
        version: version of megatron-lion that wrote the folder.
        encoder: library that made the ids, with its version.
        kind: "gpt" (one sequence for each document) or "bert" (one for each sentence).
        sources: the input files, in order.
        tokenizer: identity of the tokenizer.
        dtype: dtype of the token files, "uint16" or "int32".
        split: shares of the documents of train, valid and test in percent; they sum to 100.
        seed: seed of the hashes that assign documents to splits.
        options: other settings that affect the result (JSON key, handling of errors, …).
        documents, tokens, text_bytes: totals over all splits; text_bytes counts UTF-8 text without markup.
        duplicate_documents: number of these documents whose text equals an earlier one's.
        skipped: number of lines and documents skipped without an error (blank, empty), by kind.
        rejected: number of lines skipped because of `--on-error skip`, by kind.
        splits: files of each split by name; a split without documents is absent.
        sentences: for "bert", the number of sentences, of documents with a single sentence (training skips these,
            since a sample needs two) and of sentences that were read and divided because they were too long.
        unread_files: number of files in the given folders that were not read, by kind (an ending, or the reason).
        dropped: number of documents that were read and left out, by reason (`prepare.kept_documents`).
        overlaps: what was found of the texts given with `--decontaminate`.
    """

    version: str
    encoder: str
    kind: str
    sources: tuple[SourceInfo, ...]
    tokenizer: TokenizerInfo
    dtype: str
    split: tuple[float, float, float]
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    documents: int
    tokens: int
    text_bytes: int
    duplicate_documents: int
    skipped: dict[str, int]
    rejected: dict[str, int]
    splits: dict[str, SplitInfo]
    sentences: dict[str, int] = field(default_factory=dict)
    unread_files: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    overlaps: tuple[Overlap, ...] = ()

    def to_json(self) -> str:
        """Returns the manifest as JSON text with its format number and its own hash."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=2, ensure_ascii=False) + "\n"

    def differences(self, other: Manifest) -> list[str]:
        """Returns the differences in input and settings between two preparations; empty if their tokens are equal.

        Paths of the sources, the version that wrote the manifest and the encoder are not compared.
        """
        found = [] if _contents(self) == _contents(other) else ["the input files"]
        for name in ("kind", "dtype", "split", "seed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {mine} instead of {theirs}")
        if self.tokenizer != other.tokenizer:
            found.append(f"tokenizer {self.tokenizer.sha256[:12]}… instead of {other.tokenizer.sha256[:12]}…")
        for name in sorted(self.options.keys() | other.options.keys()):
            mine, theirs = self.options.get(name), other.options.get(name)
            if mine != theirs:
                found.append(f"{name} {mine!r} instead of {theirs!r}")
        return found


def _contents(manifest: Manifest) -> list[tuple[str, int]]:
    return [(source.sha256, source.bytes) for source in manifest.sources]


def _digest(content: dict[str, Any]) -> str:
    # One canonical text for equal content, whatever the order of keys or the indentation of the file.
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Writes manifest.json into the folder atomically and returns its path.

    Raises:
        StorageError: the file system refused.
    """
    path = Path(folder) / NAME
    write_whole(path, manifest.to_json().encode("utf-8"))
    return path


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and verifies the manifest of a dataset folder.

    Raises:
        DataError: it is missing, changed since it was written, of another format, or has a value of another type.
    """
    path = Path(folder) / NAME
    again = f"make the dataset again: megatron-lion prepare … --output {folder} --overwrite"
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no {NAME}, so this is no dataset folder made by megatron-lion prepare") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); {again}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged (a JSON object is needed); {again}")
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: format {content.get('format')!r}; this version reads format {FORMAT}; {again}")
    stated = content.pop("sha256", None)
    if stated != _digest(content):
        raise DataError(f"{path}: does not match its own sha256, so it was changed or damaged; {again}")
    del content["format"]
    for name in ("sources", "overlaps"):
        if not isinstance(content.get(name, []), list):
            raise DataError(f"{path}: {name}: {content[name]!r:.60} is not a list; {again}")
    try:
        manifest = Manifest(
            **{
                **content,
                "sources": tuple(SourceInfo(**source) for source in content["sources"]),
                "tokenizer": TokenizerInfo(**content["tokenizer"]),
                "split": tuple(content["split"]),
                "overlaps": tuple(Overlap(**overlap) for overlap in content.get("overlaps", [])),
                "splits": {name: SplitInfo(**split) for name, split in content["splits"].items()},
            }
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: an entry is missing or unknown ({error}); {again}") from None
    problem = next(_problems(manifest), None)
    if problem is not None:
        raise DataError(f"{path}: {problem}; {again}")
    return manifest


def known_vocab_size(paths: Sequence[Path]) -> int | None:
    """Returns the largest number of token ids of the dataset folders among the paths, or None if there is none.

    Raises:
        DataError: a manifest is damaged.
    """
    return max((read_manifest(path).tokenizer.vocab_size for path in paths if (path / NAME).is_file()), default=None)


def _problems(manifest: Manifest) -> Iterator[str]:
    """Yields "key: what is wrong" for each value of another type, or that no dataset has."""
    yield from _wrong_types(manifest, "")
    for number, source in enumerate(manifest.sources):
        yield from _wrong_types(source, f"sources[{number}].")
    for number, overlap in enumerate(manifest.overlaps):
        yield from _wrong_types(overlap, f"overlaps[{number}].")
    yield from _wrong_types(manifest.tokenizer, "tokenizer.")
    for name, split in manifest.splits.items():
        if name not in SPLITS:
            yield f"splits: {name!r} is none of {', '.join(SPLITS)}"
        yield from _wrong_types(split, f"splits.{name}.")
        if not is_file_name(split.prefix):
            yield f"splits.{name}.prefix: {split.prefix!r} is not the name of a file in this folder"
    if len({split.prefix for split in manifest.splits.values()}) < len(manifest.splits):
        yield "splits: two splits have the same prefix"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # not isinstance: True is an int


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(number) for number in value.values())


def _is_shares(value: Any) -> bool:
    return len(value) == 3 and all(type(share) in (int, float) and 0 <= share <= 100 for share in value)


# What the JSON value of a field must be, by the field's annotation.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string", lambda value: isinstance(value, str)),
    "str | None": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "int": ("a whole number from 0 on", _is_count),
    "int | None": ("a whole number from 0 on, or null", lambda value: value is None or _is_count(value)),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
    "dict[str, int]": ("an object of whole numbers", _is_counts),
    "tuple[float, float, float]": ("three percentages", _is_shares),
}


def _wrong_types(content: Any, where: str) -> Iterator[str]:
    for entry in dataclasses.fields(content):
        value = getattr(content, entry.name)
        what, fits = _KINDS.get(str(entry.type), ("", None))
        if entry.name == "seed":
            what, fits = "a whole number", lambda value: type(value) is int
        if fits is not None and not fits(value):
            yield f"{where}{entry.name}: {value!r:.60} is not {what}"
        elif isinstance(value, str) and not value.isprintable() and entry.name not in ("path", "eod_token", "prefix"):
            yield f"{where}{entry.name}: {value!r:.60} has control characters"  # it could rewrite a terminal's screen
