"""Input files are hashed several at a time; an error or an interrupt ends all of them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_lion.errors import DataError
from megatron_lion.prepare.find_files import input_file
from megatron_lion.prepare.hash_inputs import hash_sources
from megatron_lion.prepare.progress import NoProgress


class Bytes(NoProgress):
    """Counts bytes, sends the main thread SIGINT after `most` of them, and is slow from then on."""

    def __init__(self, most: float = float("inf")) -> None:
        self.done, self.most = 0, most

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.done > self.most:
            if self.done - num_bytes <= self.most:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.05)


def write(folder: Path, count: int, size: int) -> list[Path]:
    paths = [folder / f"{number}.jsonl" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number * size)
    return paths


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_hashes_in_the_order_of_the_files(tmp_path: Path, threads: int) -> None:
    paths = write(tmp_path, 7, 3 << 20)
    progress = Bytes()
    found = hash_sources([input_file(path, "jsonl") for path in paths], tmp_path, threads, progress)
    assert [source.path for source in found] == [path.name for path in paths]
    assert [source.sha256 for source in found] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert progress.done == sum(source.bytes for source in found)
    (other,) = hash_sources([input_file(paths[0], "jsonl")], tmp_path / "work", threads, progress)
    assert other.path == str(paths[0])


def test_the_first_unreadable_file_is_named_and_the_others_end(tmp_path: Path) -> None:
    paths = write(tmp_path, 6, 1 << 20)
    files = [input_file(path, "jsonl") for path in paths]
    for number in (2, 4):
        os.unlink(paths[number])
    with pytest.raises(DataError, match=r"2\.jsonl: cannot be read"):
        hash_sources(files, tmp_path, 3, NoProgress())


def test_an_interrupt_ends_all_threads(tmp_path: Path) -> None:
    paths = write(tmp_path, 4, 64 << 20)
    progress = Bytes(most=8 << 20)
    with pytest.raises(KeyboardInterrupt):
        hash_sources([input_file(path, "jsonl") for path in paths], tmp_path, 2, progress)
    assert progress.done < 4 * 64 << 20
