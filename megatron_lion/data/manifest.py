"""manifest.json of a dataset folder: what the tokens were made from, how, and the hashes of the result.

The manifest is written last, when everything it names is on the disk, and carries a hash of itself, so a
folder whose manifest reads is a whole one.
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
    """One split's pair of files.

    Attributes:
        prefix: file name without .bin/.idx, inside the dataset folder.
        documents, tokens: counts; tokens include the end-of-document tokens.
        bin_bytes, idx_bytes: sizes.
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
    """One input file: where it was, its size and hash as stored (compressed ones as they lay)."""

    path: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """What a checkpoint and an evaluation compare: the vocabulary's hash, kind and size."""

    sha256: str
    kind: str
    vocab_size: int
    eod_token: str | None
    eod_id: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a dataset folder.

    Attributes:
        version: version of megatron-lion that wrote it.
        encoder: library that made the ids, with its version.
        kind: "gpt" (one sequence a document) or "bert" (one a sentence).
        dtype: of the token files: "uint16" or "int32".
        split: share of the documents of train, valid and test in percent; sums to 100.
        options: the other settings that decide the result (JSON key, what to do on errors, …).
        documents, tokens, text_bytes: totals over all splits; text_bytes is UTF-8 text without markup.
        duplicate_documents: how many documents have the text of an earlier one.
        sentences: for "bert", how many there are, how many documents have a single one (BERT's samples need two, so
            these are not read in training) and how many were so long that they were divided.
        skipped: what was passed over without being an error (blank lines, empty documents), by kind.
        rejected: what was passed over because of `--on-error skip`, by kind.
        splits: by name; a split without documents is absent.
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
        """The manifest as JSON text with its format number and its own hash."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=2, ensure_ascii=False) + "\n"

    def differences(self, other: Manifest) -> list[str]:
        """What in the input or the settings of two preparations differs; empty if they make the same tokens.

        Where a file lay, who wrote the manifest and by which encoder do not matter.
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
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Writes manifest.json into the folder, whole or not at all, and returns its path."""
    path = Path(folder) / NAME
    write_whole(path, manifest.to_json().encode("utf-8"))
    return path


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and verifies the manifest of a dataset folder.

    Raises:
        DataError: there is none, it was changed since it was written, or it is of another format.
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
        raise DataError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; {again}")
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
        raise DataError(f"{path}: lacks or has an unknown entry ({error}); {again}") from None
