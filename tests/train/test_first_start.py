"""The first start of a run: killed or out of space at a file call, the same command again does the whole run."""

from __future__ import annotations

import errno
import io
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny

from megatron_lion.configfile import load_config, save_config
from megatron_lion.errors import ConfigError, StorageError
from megatron_lion.logs import log_file
from megatron_lion.runs.folder import locked, prepare_run_folder, write_json
from megatron_lion.runs.paths import facts_file, rank_log_file

KILL = 0
"""In place of an errno: the process is killed."""
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


class Fault:
    """An audit hook that makes one file call in a folder fail, or kills the process before it.

    Python reports opening, renaming, removing and making files here, for its own code and for every library's; an
    exception of the hook becomes that of the call.
    """

    def __init__(self, folder: Path, number: int, kind: int, *, without: str = "") -> None:
        self.folder, self.left, self.kind, self.without = str(folder), number, kind, without
        sys.addaudithook(self)

    def __call__(self, event: str, words: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        name = words[0] if words else None
        if not changes or not isinstance(name, str | os.PathLike):
            return
        path = os.fspath(name)
        if not path.startswith(self.folder) or (self.without and self.without in path):
            return
        self.left -= 1
        if self.left == 0:
            if self.kind == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.kind, os.strerror(self.kind), path)


def start(config: Path, prepare: Callable[[], object] | None, results: Connection) -> None:
    """Work of a forked process: the command `pretrain`; sends its exit code and what it printed."""
    from megatron_lion.cli import main

    # Not into a file, which the fault would limit, too.
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            if prepare is not None:
                prepare()
            code = main(["pretrain", "--config", str(config)])
    except BaseException:
        code = 1
        traceback.print_exc(file=printed)
    results.send((code, printed.getvalue().splitlines()))
    os._exit(code)


def in_child(work: Callable[..., object], *words: Any) -> int:
    """Runs a function in a forked process; returns the exit code: 5 for a StorageError, 1 for another exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work(*words)
        code = 0
    except StorageError:
        code = 5
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def begin(folder: Path, fresh: bool = False, fault: tuple[int, int] | None = None) -> None:
    """Opens a run folder, as the first rank does before it loads the data; the fault is (number of the call, kind)."""
    if fault is not None:
        Fault(folder, *fault)
    with locked(folder):
        prepare_run_folder(tiny.tiny_config(folder, "no-corpus", seed=8), fresh=fresh)
        with log_file(rank_log_file(folder, 0)):
            write_json(facts_file(folder), {"format": 1})


@pytest.mark.parametrize("kind", ["kill", "refuse"])
def test_a_folder_that_was_being_made_is_taken_again(kind: str, tmp_path: Path) -> None:
    codes = []
    for number in range(1, 100):
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        error = KILL if kind == "kill" else FULL[number % len(FULL)]
        codes.append(in_child(begin, folder, False, (number, error)))
        assert in_child(begin, folder) == 0, f"after call {number}, which ended with {codes[-1]}"
        assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "lock", "log", "run.json"]
        if codes[-3:] == [0, 0, 0]:  # a call may be superfluous
            break
    assert len(codes) > 8
    assert set(codes) == {-signal.SIGKILL if kind == "kill" else 5, 0}


@pytest.mark.parametrize("left", [[".config.yaml.tmp"], ["log/rank00000.log", "log/rank00001.log", ".config.yaml.tmp"]])
def test_what_earlier_versions_left_is_taken(left: list[str], tmp_path: Path) -> None:
    """They made log/ before config.yaml."""
    folder = tmp_path / "run"
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    assert in_child(begin, folder) == 0


@pytest.mark.parametrize("name", ["log/thesis.tex", "log", ".config.yaml", "run.json", "metrics.jsonl", "old.tmp"])
def test_what_is_not_left_over_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    top = name.split("/")[0]
    with pytest.raises(ConfigError, match=rf"is not empty and holds no run \(no config.yaml, but '{re.escape(top)}'\)"):
        prepare_run_folder(tiny.tiny_config(folder, "no-corpus"), fresh=False)
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("imported", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_fresh_start_that_was_killed_can_be_repeated(imported: bool, tmp_path: Path) -> None:
    """Nothing is lost, and an import keeps what it starts from."""
    for number in range(1, 100):
        folder = tmp_path / str(number) / "run"
        steps = ["step_0000000", "step_0000002"] if imported else ["step_0000002"]
        texts = {f"checkpoints/{step}/manifest.json": step for step in steps}
        texts |= {"metrics.jsonl": "{}", "tokenizer/vocab.json": "[]", "cache/index": "9"}
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        save_config(tiny.tiny_config(folder, "no-corpus", seed=7), folder / "config.yaml")
        code = in_child(begin, folder, True, (number, KILL))
        if code:
            assert in_child(begin, folder, True) == 0
        kept = {"checkpoints/step_0000000/manifest.json", "tokenizer/vocab.json"} if imported else set()
        for name, text in texts.items():
            places = [place / name for place in folder.parent.glob("run.old-*")] + [folder / name] * (name in kept)
            assert text in [place.read_text() for place in places if place.exists()], (number, name)
            assert (folder / name).exists() == (name in kept), (number, name)
        assert load_config(folder / "config.yaml").seed == 8
        if code == 0:
            break
    assert number > 8


def test_a_full_disk_costs_log_messages_and_one_line(tmp_path: Path) -> None:
    """Nothing needs the log, so the run continues."""
    path = tmp_path / "log" / "rank00000.log"
    reader, writer = os.pipe()  # a pipe has no size limit

    def log() -> None:
        with open(writer, "w") as sys.stderr, log_file(path):
            logger = logging.getLogger("megatron_lion.test")
            logger.info("first")
            Limit(path.stat().st_size + 9)()
            for number in range(5):
                logger.warning("message %d", number)

    code = in_child(log)
    os.close(writer)
    with open(reader) as stream:
        printed = stream.read()
    assert code == 0, printed
    assert printed == (
        f"megatron-lion: {path}: cannot be written: File too large; log messages are missing from here on, and the run continues\n"
    )
    assert "first" in path.read_text()


def errors_at(rank: int, config: Any, fault: tuple[int, str, int]) -> tuple[str, str]:
    """Work of one process: the error of a run in which one rank cannot open a file."""
    faulty, name, number = fault
    if rank == faulty:
        Fault(Path(config.run_dir) / name, number, errno.ENOSPC)
    return tiny.error_of(tiny.train, config)


@pytest.mark.parametrize("fault", [(1, "log/rank00001.log", 1), (0, "metrics.jsonl", 2), (0, ".environment.json.tmp", 1)],
                         ids=lambda fault: fault[1])  # fmt: skip
def test_a_full_disk_on_one_rank_ends_all_with_one_line(
    fault: tuple[int, str, int], tmp_path: Path, corpus: str
) -> None:
    config = tiny.tiny_config(tmp_path / "run", corpus, train__micro_batch_size=4)
    found = distributed.run_distributed(errors_at, 2, config, fault)
    assert [kind for kind, _ in found] == ["StorageError", "StorageError"]
    own, other = found[fault[0]][1], found[1 - fault[0]][1]
    assert own.startswith(f"{Path(config.run_dir) / fault[1]}: cannot be written: No space left on device; make room")
    assert other.endswith(f"failed on rank {fault[0]}: {own}")


class Arm:
    """Arms a fault in the process that is to meet it."""

    def __init__(self, *words: Any, **named: Any) -> None:
        self.words, self.named = words, named

    def __call__(self) -> object:
        return Fault(*self.words, **self.named)


class Limit:
    """Lets no file grow above a size, as a full disk does, in the process that calls it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Starts:
    """Starts of one config in processes forked from the server of tests/distributed.py."""

    def __init__(self, folder: Path, corpus: str) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.config = folder / "config.yaml"
        settings = {"train__steps": 1, "train__micro_batch_size": 8, "checkpoint__every": 1, "train__test_every": 1}
        save_config(tiny.tiny_config(self.run_dir, corpus, **settings), self.config)

    def __call__(self, prepare: Callable[[], object] | None = None) -> tuple[int, list[str]]:
        """Returns the exit code and the lines that the command printed."""
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=start, args=(self.config, prepare, sender))
        process.start()
        sender.close()
        assert receiver.poll(timeout=300), "the start did not end"
        try:
            code, lines = receiver.recv()
        except EOFError:  # killed
            code, lines = None, []
        process.join(timeout=60)
        assert process.exitcode is not None
        return process.exitcode if code is None else code, lines

    def fingerprint(self) -> str:
        return str(tiny.newest_checkpoint(self.run_dir).manifest["state_fingerprint"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> str:
    """The fingerprint at the end of a run without a fault."""
    starts = Starts(tmp_path_factory.mktemp("twin"), corpus)
    code, lines = starts()
    assert code == 0, lines
    return starts.fingerprint()


def check(starts: Starts, fault: Callable[[], object], kind: int, undisturbed: str) -> bool:
    """Starts with a fault and then without one; returns whether the fault came before the end of the run."""
    code, lines = starts(fault)
    if kind == KILL:
        reached = code == -signal.SIGKILL
        assert reached or code == 0, lines
    else:
        reached = code != 0
        told = [line for line in lines if line.startswith("megatron-lion")]
        assert code in (0, 5), lines
        assert len(told) == 1 or code == 0, lines
        assert not any("Traceback" in line for line in lines), lines
    again, lines = starts()
    assert again == 0, lines
    assert starts.fingerprint() == undisturbed
    left = [path for path in starts.run_dir.rglob("*") if ".tmp" in path.name]
    assert not left, left
    return reached


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KILL, None], ids=["kill", "refuse"])
def test_a_start_that_failed_at_a_call_can_be_repeated(
    kind: int | None, tmp_path: Path, corpus: str, undisturbed: str
) -> None:
    """Every sixth call; tests/faults (start-kill, start-enospc) takes every one. RUN/cache has tests of its own."""
    reached = []
    for number in range(1, 200, 6):
        (tmp_path / str(number)).mkdir()
        starts = Starts(tmp_path / str(number), corpus)
        error = FULL[len(reached) % len(FULL)] if kind is None else kind
        reached.append(check(starts, Arm(starts.run_dir, number, error, without="/cache"), error, undisturbed))
        # Some refusals are harmless; the run has fewer than 40 calls.
        if not reached[-1] and number > 40:
            break
    assert sum(reached) > 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 100_000])
def test_a_start_with_room_for_small_files_only_can_be_repeated(
    size: int, tmp_path: Path, corpus: str, undisturbed: str
) -> None:
    """Below 10,000 bytes, the store of torch.distributed finds no room before any file of ours."""
    assert check(Starts(tmp_path, corpus), Limit(size), errno.EFBIG, undisturbed)
