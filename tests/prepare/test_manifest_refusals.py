"""Each reason to reject a dataset's manifest.json, or a file beside it, has a distinct message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.data.indexed_writer import IndexedWriter, check_indexed
from megatron_lion.data.manifest import Manifest, TokenizerInfo, read_manifest, write_manifest
from megatron_lion.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a valid manifest."""
    tokenizer = TokenizerInfo(sha256="0", kind="BPE", vocab_size=300, eod_token=None, eod_id=None)
    manifest = Manifest(
        version="0", encoder="none", kind="gpt", sources=(), tokenizer=tokenizer, dtype="uint16", split=(100.0, 0.0, 0.0),
        seed=0, documents=0, tokens=0, text_bytes=1, duplicate_documents=0, skipped={}, rejected={}, splits={},
    )  # fmt: skip
    found = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    return found


def with_fitting_hash(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text("utf-8"))
    del content["sha256"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}), "utf-8")


def nothing(content: dict[str, Any]) -> None:
    pass


def test_the_hash_of_this_test_fits(path: Path) -> None:
    with_fitting_hash(path, nothing)
    assert read_manifest(path.parent).kind == "gpt"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(format=2), "format 2; this version reads format 1"),
        (lambda content: content.update(format="1"), "format '1'; this version reads format 1"),
        (lambda content: content.pop("format"), "format None; this version reads format 1"),
        (lambda content: content.pop("tokenizer"), r"an entry is missing or unknown \('tokenizer'\)"),
        (lambda content: content.pop("seed"), "an entry is missing or unknown .*seed"),
        (lambda content: content.update(shuffle=True), "an entry is missing or unknown .*shuffle"),
        (lambda content: content.update(splits=[]), "an entry is missing or unknown"),
        (lambda content: content["tokenizer"].update(size=1), "an entry is missing or unknown .*size"),
    ],
)
def test_manifests_of_another_form_are_refused(path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    with_fitting_hash(path, change)
    with pytest.raises(DataError, match=rf"manifest\.json: {said}.*prepare … --output {path.parent} --overwrite"):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"damaged \(Expecting value"),
        (b"{", r"damaged \(Expecting property name"),
        (b"\xff\xfe{}", r"damaged \('utf-8' codec"),
        (b"[" * 200_000, r"damaged \(maximum recursion depth|damaged \(.*[Rr]ecursion"),
        (b"9" * 5000, r"damaged \(Exceeds the limit"),
        (b"[]", r"damaged \(a JSON object is needed\)"),
        (b"null", r"damaged \(a JSON object is needed\)"),
        (b'{"format": 1}', "does not match its own sha256"),
    ],
)
def test_damaged_manifests_are_refused(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"manifest\.json: ({said})"):
        read_manifest(path.parent)


def test_one_changed_value_is_refused(path: Path) -> None:
    path.write_text(path.read_text("utf-8").replace('"seed": 0', '"seed": 1'), "utf-8")
    with pytest.raises(DataError, match="does not match its own sha256, so it was changed or damaged"):
        read_manifest(path.parent)


def test_a_manifest_that_cannot_be_read(path: Path) -> None:
    path.unlink()
    with pytest.raises(DataError, match=r"no manifest\.json, so this is no dataset folder"):
        read_manifest(path.parent)
    path.mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read: Is a directory"):
        read_manifest(path.parent)


def test_token_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([1, 2])
        writer.finalize()

    def refuse(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.idx: cannot be read: Input/output error"):
        check_indexed(tmp_path / "a")
