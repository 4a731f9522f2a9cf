"""Index files decide what is trained on: damaged ones are never read, and no fault leaves any that could be."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed  # its fork server has imported torch and megatron-core
import numpy as np
import pytest
import tiny
import tiny_bert
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import DataConfig, ModelConfig, ProbeConfig
from megatron_lion.data.corpora import Corpora, open_corpora
from megatron_lion.data.datasets import _DatasetTokenizer, build_datasets
from megatron_lion.data.index_cache import LISTING, index_folder
from megatron_lion.data.probe_samples import open_probe_samples
from megatron_lion.device import Device
from megatron_lion.errors import DataError, StorageError
from megatron_lion.parallel import process_groups

MODEL = ModelConfig(seq_length=16, vocab_size=tiny.VOCAB, make_vocab_size_divisible_by=8)
BERT = ModelConfig(kind="bert", seq_length=64, make_vocab_size_divisible_by=64)
COUNT = 24
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "zeros": lambda content: content[:128] + bytes(len(content) - 128),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "missing": lambda content: None,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    return [tiny.write_corpus(folder / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert.write_bert_corpus(tmp_path_factory.mktemp("bert"), tiny_bert.documents(12, 300, seed=3))


def opened(paths: list[str], weights: list[float] | None = None) -> Corpora:
    return open_corpora(DataConfig(path=paths, split="80,10,10", weights=weights), MODEL)


def tokens_of(dataset: Any) -> np.ndarray:
    return np.stack([np.asarray(dataset[number]["tokens"]) for number in range(COUNT)])


def read_gpt(paths: list[str], weights: list[float] | None, cache: Path, seed: int = 7) -> np.ndarray:
    return tokens_of(build_datasets(opened(paths, weights), MODEL, (COUNT, 0, 0), seed=seed, cache=cache)[0])


def read_bert(path: str, cache: Path) -> np.ndarray:
    corpus = open_corpora(DataConfig(path=[path]), BERT)
    with process_groups(Device("cpu", 0, "gloo")):
        return tokens_of(build_datasets(corpus, BERT, (COUNT, 0, 0), seed=7, cache=cache)[0])


def read_probe(paths: list[str], cache: Path) -> np.ndarray:
    probe = ProbeConfig(num_batches=COUNT // 8, data="fresh")
    return tokens_of(open_probe_samples(opened(paths), MODEL, probe, 8, seed=7, cache=cache).at(3))


def megatrons_own(paths: list[str], weights: list[float] | None, folder: Path, seed: int = 7) -> np.ndarray:
    """Returns the samples that Megatron's own builder gives, with its cache in `folder`."""
    found = opened(paths, weights)
    tokenizer = _DatasetTokenizer(tiny.VOCAB, tiny.VOCAB - 1, found.digest)
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=16, blend=(paths, weights), split="80,10,10", path_to_cache=str(folder), tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return tokens_of(BlendedMegatronDatasetBuilder(GPTDataset, [COUNT, 1, 1], lambda: True, config).build()[0])


def index_files(cache: Path, ending: str = "") -> list[Path]:
    found = sorted(path for path in cache.glob(f"*/*{ending}") if path.name != LISTING or ending == LISTING)
    assert found
    return found


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_lion")]
    caplog.clear()
    return lines


def left_in(cache: Path) -> list[str]:
    """Names in the cache that are neither a folder of index files nor its lock."""
    return [
        path.name
        for path in cache.iterdir()
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".lock")
    ]


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
    }[kind]  # type: ignore[assignment]
    cache = tmp_path / "cache"
    whole = read(cache)
    if kind in ("one", "blend"):
        paths, weights = (corpora[:1], None) if kind == "one" else (corpora, [3.0, 1.0])
        assert np.array_equal(whole, megatrons_own(paths, weights, tmp_path / "megatron"))
    assert not told(caplog)
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
            lines = told(caplog)
            assert len(lines) == 1, (name, how, lines)
            assert str(path.parent) in lines[0]
            assert "building them again" in lines[0]
            assert path.read_bytes() == content, (name, how)
            assert not left_in(cache)
    assert np.array_equal(read(cache), whole)
    assert not told(caplog)


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
    assert "SHA-256 of" in told(caplog)[0]
    aside = tmp_path / "aside"
    ours.parent.rename(aside)
    theirs.parent.rename(ours.parent)
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert "built from other data or settings" in told(caplog)[0]


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
    assert "is not a plain file" in told(caplog)[0]
    assert outside.read_bytes() == kept
    folder = path.parent
    folder.rename(tmp_path / "aside")
    folder.write_text("a file")
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert len(told(caplog)) == 1
    listing = folder / LISTING
    content = json.loads(listing.read_text())
    content["files"] = {"../../outside": content["files"].popitem()[1]}
    listing.write_text(json.dumps(content))
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    assert len(told(caplog)) == 1


def test_index_files_of_an_earlier_version_are_not_read(
    corpora: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    earlier = cache / opened(corpora[:1]).digest[:16]
    whole = megatrons_own(corpora[:1], None, earlier)
    for path in earlier.glob("*shuffle_index.npy"):
        path.write_bytes(DAMAGE["zeros"](path.read_bytes()) or b"")
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    lines = told(caplog)
    assert len(lines) == 1
    assert f"{cache}: index files of an earlier version" in lines[0]
    assert np.array_equal(read_gpt(corpora[:1], None, cache), whole)
    read_gpt(corpora[:1], None, cache, seed=8)
    assert not told(caplog)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("save", None),  # numpy reports a short write without errno
        *itertools.product(("save", "fsync", "rename", "mkdir"), (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)),
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
        *(pytest.param(*moment, marks=pytest.mark.slow) for moment in (("save", 1), ("fsync", 2), ("rename", 1))),
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


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_job_waits_and_takes_the_files_of_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    building, go = threading.Event(), threading.Event()
    builds: list[str] = []

    def build(folder: Path) -> list[Any]:
        builds.append(threading.current_thread().name)
        (folder / "text").write_text("content")
        building.set()
        assert go.wait(60)
        return ["content"]

    def work() -> None:
        found.append(index_folder(tmp_path, "0" * 64, {"a": 1}, build))

    found: list[Path] = []
    jobs = [threading.Thread(target=work, name=name) for name in ("first", "second")]
    jobs[0].start()
    assert building.wait(60)
    jobs[1].start()
    wait_until(lambda: any("waiting for it" in record.getMessage() for record in caplog.records))
    assert f"in use by another job (pid {os.getpid()} on " in told(caplog)[0]
    go.set()
    for job in jobs:
        job.join(60)
    assert builds == ["first"]
    assert len(found) == 2
    assert found[0] == found[1]
    assert (found[0] / "text").read_text() == "content"


def build_at_once(paths: list[str], cache: str, result: str, barrier: Any) -> None:
    """Work of a process: waits for the others, then builds and saves the samples."""
    barrier.wait(60)
    np.save(result, read_gpt(paths, [3.0, 1.0], Path(cache)))


@pytest.mark.slow
def test_jobs_that_start_at_the_same_moment(corpora: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(4)
    results = [tmp_path / f"{number}.npy" for number in range(4)]
    jobs = [
        context.Process(target=build_at_once, args=(corpora, str(tmp_path / "cache"), str(result), barrier))
        for result in results
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(200)
    expected = megatrons_own(corpora, [3.0, 1.0], tmp_path / "megatron")
    assert [np.array_equal(np.load(result), expected) for result in results] == [True] * 4
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert not left_in(tmp_path / "cache")


def train_and_listen(rank: int, config: Any) -> tuple[Any, list[str]]:
    """Work of one process: trains, and returns the outcome and the warnings of its log file."""
    result = tiny.train(config)
    log = next(Path(config.run_dir, "log").glob(f"*{rank}*")).read_text()
    return result, [line for line in log.splitlines() if "WARNING megatron_lion" in line]


def test_a_resumed_run_reads_the_same_samples(corpora: list[str], tmp_path: Path) -> None:
    """On two processes: whole, and with every array of the cache full of zeros between two jobs."""
    config = tiny.tiny_config(
        tmp_path / "whole", corpora[0], train__steps=4, train__micro_batch_size=4, train__test_every=2, probe__every=2,
        probe__num_batches=2,
    )  # fmt: skip
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    whole = distributed.run_distributed(tiny.train_each, 2, {"": config})[0][""]
    half = dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=2))
    distributed.run_distributed(tiny.train_each, 2, {"": half})
    arrays = index_files(tmp_path / "cut" / "cache", ".npy")
    assert len({path.parent for path in arrays}) == 2, "of training and of the probe"
    for path in arrays:
        path.write_bytes(DAMAGE["zeros"](path.read_bytes()) or b"")
    (outcome, lines), (_, others) = distributed.run_distributed(train_and_listen, 2, cut)
    assert outcome["losses"] == whole["losses"]
    assert outcome["probes"][-1]["probe/loss"] == whole["probes"][-1]["probe/loss"]
    assert outcome["manifest"]["state_fingerprint"] == whole["manifest"]["state_fingerprint"]
    assert len([line for line in lines if "building them again" in line]) == 2, "one for each folder of index files"
    assert not others


def open_in_own_folder(rank: int, paths: list[str], folder: str, damage: bool) -> tuple[str, str]:
    cache = Path(folder) / ("shared" if damage else f"node{rank}")
    if damage and rank == 1:
        os.environ["LOCAL_RANK"] = "0"
    return tiny.error_of(read_gpt, paths, None, cache)


def test_a_cache_that_the_nodes_do_not_share_is_named(corpora: list[str], tmp_path: Path) -> None:
    errors = distributed.run_distributed(open_in_own_folder, 2, corpora[:1], str(tmp_path), False)
    for kind, message in errors:
        assert kind == "StorageError"
        assert "rank 1 on" in message
        assert "set data.cache to a folder that all nodes share" in message
    errors = distributed.run_distributed(open_in_own_folder, 2, corpora[:1], str(tmp_path), True)
    assert errors == [("", "")] * 2


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
