"""Each reason to reject a dataset's manifest.json, or a file beside it, has a distinct message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_bpe import write_byte_bpe

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.indexed_writer import IndexedWriter, check_indexed
from megatron_lion.data.manifest import Manifest, TokenizerInfo, read_manifest, write_manifest
from megatron_lion.errors import DataError
from megatron_lion.prepare.options import PrepareOptions
from megatron_lion.prepare.pipeline import prepare


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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of `prepare` with three splits."""
    folder = tmp_path_factory.mktemp("dataset")
    write_byte_bpe(folder, "d o")
    texts = [f"document {number}" for number in range(40)]
    prepare(PrepareOptions(tokenizer=folder, output=folder / "data", split="80,10,10", workers=1), texts)
    return folder / "data"


def opened(folder: Path) -> str:
    """Opens a dataset folder as a run does; returns the message of the refusal, or "" if it is accepted."""
    try:
        open_corpora(DataConfig(path=[str(folder)]), ModelConfig(seq_length=8))
    except DataError as error:
        return str(error)
    return ""


def places(content: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of each value of a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [(*where, key) for key, _ in items]
    return found + [place for key, value in items for place in places(value, (*where, key))]


STRANGE: list[Any] = [None, True, -1, 10**30, 1.5, float("inf"), "x", "", "../x", "a\x1b[31m", [], [1], {}, {"a": "b"}]


def test_values_of_other_types_are_refused_with_their_key(dataset: Path, tmp_path: Path) -> None:
    """Each value of a manifest, replaced by strange ones: never a traceback, never an undefined value that is accepted."""
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    path = copy / "manifest.json"
    whole = path.read_text("utf-8")
    content = json.loads(whole)
    assert opened(copy) == ""
    refused = 0
    # `options` and `sources` describe how the folder was made; a run does not use their values.
    used = [place for place in places(content) if place[0] not in ("format", "sha256", "options")]
    assert len(used) > 40
    for place in used:
        for value in STRANGE:
            path.write_text(whole, "utf-8")

            def change(content: dict[str, Any], place: tuple[Any, ...] = place, value: Any = value) -> None:
                for key in place[:-1]:
                    content = content[key]
                content[place[-1]] = value

            with_fitting_hash(path, change)
            before = content
            for key in place:
                before = before[key]
            message = opened(copy)
            if type(value) is not type(before) and not (type(before) is float and type(value) is int):
                allowed = place[-1] in ("eod_token", "eod_id") and (value is None or type(value) is type(before))
                assert message or allowed, (place, value)
                refused += 1
                assert str(path) in message or allowed
                assert place[0] in message or "an entry is missing" in message or allowed, (place, value, message)
            assert "\x1b" not in message
    assert refused > 500


@pytest.mark.parametrize("name", ["../outside/x", "/etc/x", "a/b", "..", ".", "", "./x", "x/", "a\0b", "a\nb"])
def test_token_files_are_named_inside_the_folder(dataset: Path, tmp_path: Path, name: str) -> None:
    copy, outside = tmp_path / "data", tmp_path / "outside"
    shutil.copytree(dataset, copy)
    outside.mkdir()
    for ending in (".bin", ".idx"):
        shutil.copyfile(dataset / f"train_text_document{ending}", outside / f"x{ending}")
    with_fitting_hash(copy / "manifest.json", lambda content: content["splits"]["train"].update(prefix=name))
    assert "splits.train.prefix: " in opened(copy)
    assert "is not the name of a file in this folder" in opened(copy)


def test_two_splits_with_one_pair_of_files(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    with_fitting_hash(
        tmp_path / "data/manifest.json", lambda content: content["splits"].update(valid=content["splits"]["train"])
    )
    assert "splits: two splits have the same prefix" in opened(tmp_path / "data")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_links_out_of_the_folder_are_refused(dataset: Path, tmp_path: Path, ending: str) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    file = tmp_path / "data" / f"valid_text_document{ending}"
    file.rename(tmp_path / f"elsewhere{ending}")
    file.symlink_to(tmp_path / f"elsewhere{ending}")
    assert f"{file}: is a link to {tmp_path}/elsewhere{ending}, outside of the dataset folder" in opened(
        tmp_path / "data"
    )
    file.unlink()
    (tmp_path / f"elsewhere{ending}").rename(file.with_name(f"inside{ending}"))
    file.symlink_to(f"inside{ending}")
    assert opened(tmp_path / "data") == ""
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert opened(tmp_path / "link") == ""


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

    def refuse(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(DataError, match=r"a\.idx: cannot be read: Input/output error"):
        check_indexed(tmp_path / "a")
