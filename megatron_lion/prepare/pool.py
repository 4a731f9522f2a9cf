"""Encodes the pieces of a corpus on several processes and returns their shards in the corpus's order."""

from __future__ import annotations

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
from megatron_lion.prepare.encode_piece import EncodeSettings, Shard, encode_piece, load_shard
from megatron_lion.prepare.encoders import Encoder, EncoderName, build_encoder
from megatron_lion.prepare.pieces import Piece, problem_message
from megatron_lion.signals import blocked, signal_when_parent_ends

# Set once in each worker process by _start_worker.
_worker: tuple[EncodeSettings, Encoder] | None = None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(parent: int, settings: EncodeSettings, tokenizer: Tokenizer, encoder: EncoderName) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked
    signal_when_parent_ends(signal.SIGKILL)  # a killed parent must not leave workers behind
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _worker = settings, build_encoder(encoder, tokenizer, settings.splitter)


@contextmanager
def _interrupts_blocked_in_children() -> Iterator[None]:
    """Processes started within inherit a blocked SIGINT, and keep it.

    An interrupt from the terminal reaches every process, also one that is still importing; the parent alone
    decides. It gets an interrupt that comes within at the end.
    """
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # its start, within a worker's start, would unblock SIGINT
    with blocked([signal.SIGINT]):
        yield


def _work(piece: Piece, folder: Path, name: str) -> Shard:
    assert _worker is not None, "the pool's initializer has run"
    settings, encoder = _worker
    return encode_piece(piece, folder, name, settings, encoder)


class Collector:
    """Takes shards as they get ready, and knows the first bad line of the corpus.

    Attributes:
        shards: by the pieces' place in the corpus.
        reused: how many came from an earlier run.
    """

    def __init__(self, on_shard: Callable[[Piece, Shard], None], stop_on_problem: bool) -> None:
        self.shards: dict[int, tuple[Piece, Shard]] = {}
        self.reused = 0
        self.stopped = False
        self._on_shard = on_shard
        self._stop = stop_on_problem

    def take(self, place: int, piece: Piece, shard: Shard) -> None:
        """Records one shard."""
        self.shards[place] = piece, shard
        self.stopped |= self._stop and bool(shard.read.problems)
        self._on_shard(piece, shard)

    def raise_first_problem(self) -> None:
        """Raises DataError FILE:LINE for the first bad line in the corpus's order, if there is one."""
        lines_before: dict[Path, int] = {}
        for _, (piece, shard) in sorted(self.shards.items()):
            path = piece.file.path
            if self._stop and shard.read.problems:
                line, _, what = shard.read.problems[0]
                row = piece.file.format == "parquet"
                raise DataError(problem_message(path, lines_before.get(path, 0) + line, what, row=row))
            lines_before[path] = lines_before.get(path, 0) + shard.read.lines


def encode_pieces(
    pieces: Iterable[tuple[str, Piece]],
    folder: Path,
    settings: EncodeSettings,
    tokenizer: Tokenizer,
    encoder: EncoderName,
    workers: int,
    on_shard: Callable[[Piece, Shard], None],
) -> Collector:
    """Encodes all pieces; shards that an earlier run left whole are taken as they are.

    Args:
        pieces: (shard name, piece) in the corpus's order.
        folder: where shards go.
        settings, tokenizer, encoder: what the workers are given.
        workers: processes; 1 works in this one.
        on_shard: called for every shard, as it gets ready, in any order.

    Raises:
        DataError: the first bad line of the corpus (on_error "stop"), or a damaged file.
        PeerError: a worker was killed.
        StorageError: a shard cannot be written.
    """
    collector = Collector(on_shard, settings.read.on_error == "stop")
    if workers == 1:
        mine = build_encoder(encoder, tokenizer, settings.splitter)
        for place, (name, piece) in enumerate(pieces):
            shard = load_shard(folder, name)
            collector.reused += shard is not None
            collector.take(place, piece, shard or encode_piece(piece, folder, name, settings, mine))
            if collector.stopped:
                break
    else:
        _encode_in_pool(pieces, folder, (settings, tokenizer, encoder), workers, collector)
    collector.raise_first_problem()
    return collector


def _encode_in_pool(
    pieces: Iterable[tuple[str, Piece]],
    folder: Path,
    given: tuple[EncodeSettings, Tokenizer, EncoderName],
    workers: int,
    collector: Collector,
) -> None:
    # spawn: a fork would copy the locks of this process's other threads in whatever state they are.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(), *given)
    )
    pending: dict[Future[Shard], tuple[int, Piece]] = {}

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
            collect(limit=2 * workers)
            if collector.stopped:
                break
        collect(limit=0)
    except BrokenProcessPool:
        raise PeerError(
            "a worker process of prepare was killed, most often for lack of memory; what is done is kept: give the "
            f"same command again, with fewer workers if memory is short (--workers {max(1, workers // 2)})"
        ) from None
    except BaseException:
        # Do not wait for pieces whose shards nobody will use.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
