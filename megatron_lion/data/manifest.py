"""Reads and writes manifest.json of a dataset folder: sources, settings, counts and hashes of the token files.

The manifest is written last, after every file that it names is on the disk, and contains a hash of itself. So a
folder with a readable manifest is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lion.errors import DataError
from megatron_lion.files import write_whole

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
        duplicate_documents: number of documents whose text equals an earlier one's.
        skipped: number of lines and documents skipped without an error (blank, empty), by kind.
        rejected: number of lines skipped because of `--on-error skip`, by kind.
        splits: files of each split by name; a split without documents is absent.
        sentences: for "bert", the number of sentences, of documents with a single sentence (training skips these,
            since a sample needs two) and of sentences that were divided because they were too long.
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
        DataError: it is missing, changed since it was written, or of another format.
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
    try:
        return Manifest(
            **{
                **content,
                "sources": tuple(SourceInfo(**source) for source in content["sources"]),
                "tokenizer": TokenizerInfo(**content["tokenizer"]),
                "split": tuple(content["split"]),
                "splits": {name: SplitInfo(**split) for name, split in content["splits"].items()},
            }
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: an entry is missing or unknown ({error}); {again}") from None
