"""Index files decide what is trained on: damaged ones are never read, and no fault leaves any that could be."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_bert
from index_samples import (
    COUNT,
    DAMAGE,
    MODEL,
    index_files,
    left_in,
    megatrons_own,
    opened,
    read_bert,
    read_gpt,
    read_probe,
    reported,
)

from megatron_lion import folder_swap
from megatron_lion.config import DataConfig
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.data.index_cache import LISTING
from megatron_lion.errors import DataError, StorageError


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    return [tiny.write_corpus(folder / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert.write_bert_corpus(tmp_path_factory.mktemp("bert"), tiny_bert.documents(12, 300, seed=3))


@pytest.mark.parametrize("kind", ["one", "blend", "bert", "probe"])
@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damaged_index_files_are_built_again(
    kind: str, each: bool, corpora: list[str], sentences: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read: Callable[[Path], np.ndarray] = {
        "one": lambda cache: read_gpt(corpora[:1], None, cache),
        "blend": lambda cache: read_gpt(corpora, [3.0, 1.0], cache),
        "bert": lambda cache: read_bert(sentences, cache),
        "probe": lambda cache: read_probe(corpora, cache),
    }[kind]
    cache = tmp_path / "cache"
    whole = read(cache)
    if kind in ("one", "blend"):
        paths, weights = (corpora[:1], None) if kind == "one" else (corpora, [3.0, 1.0])
        assert np.array_equal(whole, megatrons_own(paths, weights, tmp_path / "megatron"))
    assert not reported(caplog)
    files = sorted([*index_files(cache), *index_files(cache, LISTING)], key=lambda path: path.stat().st_size)
    affixes = {path.name.split("-")[-1]: path for path in files}  # the largest of each kind: of the training split
    wanted = {"bert": 3, "one": 5, "blend": 7, "probe": 7}
    assert len(affixes) == wanted[kind], "description, listing, and each kind of array"
    damages = itertools.cycle(DAMAGE.items())
    for name, path in affixes.items():
        content = path.read_bytes()
        for how, damage in DAMAGE.items() if each else [next(damages)]:
            damaged = damage(content)
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert np.array_equal(read(cache), whole), (name, how)
            lines = reported(caplog)
            assert len(lines) == 1, (name, how, lines)
            assert str(path.parent) in lines[0]
            assert "building them again" in lines[0]
            assert path.read_bytes() == content, (name, how)
            assert not left_in(cache)
    assert np.array_equal(read(cache), whole)
    assert not reported(caplog)


def test_index_files_of_another_seed_are_not_taken(
    corpora: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files under right names, and a whole folder with a fitting listing under another's name."""
    cache = tmp_path / "cache"
    whole = read_gpt(corpora[:1], None, cache)
    ours = index_files(cache, "train-shuffle_index.npy")[0]
    read_gpt(corpora[:1], None, cache, seed=8)
    theirs = next(path for path in index_files(cache, "train-shuffle_index.npy") if path.parent != ours.parent)
    assert ours.stat().st_size == theirs.stat().st_size
    ours.write_bytes(theirs.read_bytes())
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert "SHA-256 of" in reported(caplog)[0]
    aside = tmp_path / "aside"
    ours.parent.rename(aside)
    theirs.parent.rename(ours.parent)
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert "built from other data or settings" in reported(caplog)[0]


def test_links_and_folders_in_place_of_index_files_are_not_followed(
    corpora: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    whole = read_gpt(corpora[:1], None, cache)
    path = index_files(cache, "sample_index.npy")[0]
    path.rename(outside)
    path.symlink_to(outside)
    kept = outside.read_bytes()
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert "is not a plain file" in reported(caplog)[0]
    assert outside.read_bytes() == kept
    folder = path.parent
    folder.rename(tmp_path / "aside")
    folder.write_text("a file")
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert len(reported(caplog)) == 1
    listing = folder / LISTING
    content = json.loads(listing.read_text())
    content["files"] = {"../../outside": content["files"].popitem()[1]}
    listing.write_text(json.dumps(content))
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert len(reported(caplog)) == 1


def test_index_files_of_an_earlier_version_are_not_read(
    corpora: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    earlier = cache / opened(corpora[:1]).digest[:16]
    whole = megatrons_own(corpora[:1], None, earlier)
    for path in earlier.glob("*shuffle_index.npy"):
        path.write_bytes(DAMAGE["zeros"](path.read_bytes()) or b"")
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    lines = reported(caplog)
    assert len(lines) == 1
    assert f"{cache}: index files of an earlier version" in lines[0]
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    read_gpt(corpora[:1], None, cache, seed=8)
    assert not reported(caplog)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("save", None),  # numpy reports a short write without errno
        *itertools.product(("save", "fsync", "replace", "mkdir"), (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)),
    ],
)
def test_a_refused_write_is_one_line_and_can_be_repeated(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int | None
) -> None:
    cache = tmp_path / "cache"

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise OSError(number, os.strerror(number)) if number else OSError("1234 requested and 0 written")

    with monkeypatch.context() as patch:
        place = {"save": np, "mkdir": Path}.get(call, os)
        patch.setattr(place, call, refuse)
        with pytest.raises(
            StorageError, match=r"cannot be (written|made): .*then give the same command again"
        ) as caught:
            read_gpt(corpora[:1], None, cache)
    assert "\n" not in str(caught.value)
    assert ("make room there" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT, None))
    assert not cache.exists() or not left_in(cache)
    assert np.array_equal(read_gpt(corpora[:1], None, cache), megatrons_own(corpora[:1], None, tmp_path / "megatron"))


def test_what_is_read_back_is_compared_with_what_was_in_memory(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(path: str, array: Any, **settings: Any) -> None:
        save(path, array, **settings)
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    save = np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", flip)
        with pytest.raises(StorageError, match="do not hold what was just written"):
            read_gpt(corpora[:1], None, tmp_path / "cache")
    assert not left_in(tmp_path / "cache")
    assert read_gpt(corpora[:1], None, tmp_path / "cache").shape == (COUNT, 16)


def build_and_die(paths: list[str], cache: str, call: str, number: int) -> None:
    """Work of a process: builds the index files and is killed in the n-th call of a function, after half of the write."""
    place = np if call == "save" else os
    original, calls = getattr(place, call), 0

    def die(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return original(*arguments, **settings)
        if call == "save":
            original(*arguments, **settings)
            os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(place, call, die)
    if call == "rename":  # the way of a file system that cannot exchange two names
        folder_swap._exchange = lambda one, other: False
    read_gpt(paths, None, Path(cache))


def build_on_a_full_disk(paths: list[str], cache: str, limit: int) -> None:
    """Work of a process: no file may grow beyond the limit, so that numpy's write is cut short; ends with the exit code."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        read_gpt(paths, None, Path(cache))
    except StorageError as error:
        os._exit(error.exit_code)


def run(target: Callable[..., None], *arguments: Any) -> int:
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("save", 3),
        *(pytest.param(*moment, marks=pytest.mark.slow) for moment in (("save", 1), ("fsync", 2), ("replace", 2))),
    ],
)
def test_the_same_command_recovers_from_a_kill(corpora: list[str], tmp_path: Path, call: str, number: int) -> None:
    cache = tmp_path / "cache"
    assert run(build_and_die, corpora[:1], str(cache), call, number) == -signal.SIGKILL
    assert np.array_equal(read_gpt(corpora[:1], None, cache), megatrons_own(corpora[:1], None, tmp_path / "megatron"))
    assert not left_in(cache)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_the_same_command_recovers_from_a_kill_in_the_replacement(
    corpora: list[str], tmp_path: Path, number: int
) -> None:
    cache = tmp_path / "cache"
    whole = read_gpt(corpora[:1], None, cache)
    index_files(cache, "train-shuffle_index.npy")[0].write_bytes(b"")
    assert run(build_and_die, corpora[:1], str(cache), "rename", number) == -signal.SIGKILL
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert not left_in(cache)


def test_the_same_command_recovers_from_a_full_disk(corpora: list[str], tmp_path: Path) -> None:
    assert run(build_on_a_full_disk, corpora[:1], str(tmp_path / "full"), 700) == 5
    whole = megatrons_own(corpora[:1], None, tmp_path / "megatron")
    assert np.array_equal(read_gpt(corpora[:1], None, tmp_path / "full"), whole)


def test_a_fault_of_the_builder_is_not_too_little_data(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise ValueError("cannot reshape array")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(ValueError, match="cannot reshape"):
        read_gpt(corpora[:1], None, tmp_path)


def test_a_split_without_a_share_is_not_measured(corpora: list[str], tmp_path: Path) -> None:
    found = open_corpora(DataConfig(path=corpora[:1], split="100,0,0"), MODEL)
    with pytest.raises(DataError, match=r"the valid data holds 0 samples of 16 tokens, 8 will be read; .*data\.split"):
        build_datasets(found, MODEL, (8, 8, 8), seed=7, cache=tmp_path)
