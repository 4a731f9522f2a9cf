"""Encodes the pieces of a corpus in several worker processes and collects their shards."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import DataError, PeerError
from megatron_lion.files import write_whole
from megatron_lion.prepare.encode_piece import EncodeSettings, encode_piece
from megatron_lion.prepare.encoders import Encoder, EncoderName, build_encoder
from megatron_lion.prepare.pieces import Piece, problem_message
from megatron_lion.prepare.shards import EncodedShard, load_shard
from megatron_lion.signals import blocked, signal_when_parent_ends

# Set once in each worker process by _start_worker.
_worker: tuple[EncodeSettings, Encoder] | None = None


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(parent: int, settings: EncodeSettings, tokenizer: Path, encoder: EncoderName) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # should anything in the worker unblock it
    signal_when_parent_ends(signal.SIGKILL)  # a killed parent must not leave workers behind
    # If the parent ended before the line above, that line has no effect.
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    loaded = Tokenizer.from_json(tokenizer.read_bytes())
    _worker = settings, build_encoder(encoder, loaded, settings.splitter, compared=True)


@contextmanager
def _interrupts_blocked_in_children() -> Iterator[None]:
    """Blocks SIGINT; processes started in the block inherit this.

    An interrupt from the terminal reaches every process, and would end a worker that is still importing with a
    traceback. Only the parent handles it; an interrupt during the block is delivered at its end.
    """
    resource_tracker.ensure_running()  # otherwise the first worker starts it, which unblocks SIGINT
    with blocked([signal.SIGINT]):
        yield


def _work(piece: Piece, folder: Path, name: str) -> EncodedShard:
    assert _worker is not None, "the pool's initializer has run"
    settings, encoder = _worker
    return encode_piece(piece, folder, name, settings, encoder)


class Collector:
    """Collects shards as they are completed, and finds the first bad line of the corpus.

    Attributes:
        shards: (piece, shard) by the piece's position in the corpus; the pieces are without their bytes.
        reused: number of shards from an earlier run.
        stopped: whether a bad line ends the preparation.
    """

    def __init__(self, on_shard: Callable[[Piece, EncodedShard], None], stop_on_problem: bool) -> None:
        self.shards: dict[int, tuple[Piece, EncodedShard]] = {}
        self.reused = 0
        self.stopped = False
        self._on_shard = on_shard
        self._stop = stop_on_problem

    def take(self, place: int, piece: Piece, shard: EncodedShard) -> None:
        """Records the shard of the piece at position `place` in the corpus, without the bytes that the piece carries."""
        self.shards[place] = dataclasses.replace(piece, data=None, members=None), shard
        self.stopped |= self._stop and bool(shard.read.problems)
        self._on_shard(piece, shard)

    def raise_first_problem(self) -> None:
        """Raises a DataError with FILE:LINE for the first bad line in the corpus's order, if there is one."""
        lines_before: dict[Path, int] = {}
        for _, (piece, shard) in sorted(self.shards.items()):
            path = piece.file.path
            if self._stop and shard.read.problems:
                line, _, what = shard.read.problems[0]
                raise DataError(problem_message(path, lines_before.get(path, 0) + line, what, piece.unit))
            lines_before[path] = lines_before.get(path, 0) + shard.read.lines


def encode_pieces(
    pieces: Iterable[tuple[str, Piece]],
    folder: Path,
    settings: EncodeSettings,
    tokenizer: Tokenizer,
    encoder: Encoder,
    workers: int,
    on_shard: Callable[[Piece, EncodedShard], None],
) -> Collector:
    """Encodes all pieces, reusing the complete shards of an earlier run.

    Args:
        pieces: (shard name, piece) in the corpus's order.
        folder: folder of the shards.
        settings: settings of each worker.
        tokenizer: tokenizer of the encoder.
        encoder: encoder of this process; each worker builds one of the same library.
        workers: number of processes; 1 encodes in this process.
        on_shard: called for every shard when it is complete, in any order.

    Returns:
        The collected shards, by position in the corpus.

    Raises:
        DataError: a line is bad and `on_error` is "stop" (names the first in the corpus), or a file is damaged.
        PeerError: a worker process was killed.
        StorageError: a shard cannot be written.
    """
    collector = Collector(on_shard, settings.read.on_error == "stop")
    if workers == 1:
        for place, (name, piece) in enumerate(pieces):
            shard = load_shard(folder, name)
            collector.reused += shard is not None
            collector.take(place, piece, shard or encode_piece(piece, folder, name, settings, encoder))
            if collector.stopped:
                break
    else:
        # In a file: while a process starts, its parent waits until it has read its arguments, and would wait without end
        # if the process was killed, because the arguments are larger than what a pipe holds.
        path = folder.parent / "tokenizer.json"
        write_whole(path, tokenizer.to_json().encode())
        library: EncoderName = "gigatoken" if encoder.name.startswith("gigatoken") else "tokenizers"
        _encode_in_pool(pieces, folder, (settings, path, library), workers, collector)
    collector.raise_first_problem()
    return collector


def _encode_in_pool(
    pieces: Iterable[tuple[str, Piece]],
    folder: Path,
    given: tuple[EncodeSettings, Path, EncoderName],
    workers: int,
    collector: Collector,
) -> None:
    # spawn, because a fork copies locks that other threads hold, and nothing in the child releases them.
    # ProcessPoolExecutor raises if a worker is killed; multiprocessing's Pool.imap would wait without end.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(), *given)
    )
    pending: dict[Future[EncodedShard], tuple[int, Piece]] = {}

    def collect(limit: int) -> None:
        while len(pending) > limit:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                place, piece = pending.pop(future)
                collector.take(place, piece, future.result())

    try:
        for place, (name, piece) in enumerate(pieces):
            if shard := load_shard(folder, name):
                collector.reused += 1
                collector.take(place, piece, shard)
            else:
                with _interrupts_blocked_in_children():  # the pool's processes start within its first submit
                    pending[pool.submit(_work, piece, folder, name)] = place, piece
            collect(limit=2 * workers)  # bounds the memory of queued pieces, which may hold their bytes
            if collector.stopped:
                break
        collect(limit=0)
    except BrokenProcessPool:
        raise PeerError(
            "a worker process of prepare was killed, most often because memory ran out; finished pieces are kept; run the "
            f"same command again, with fewer workers if memory is short (--workers {max(1, workers // 2)})"
        ) from None
    except BaseException:
        # Killed, because shutdown below would wait for running pieces, whose shards are no longer needed.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
