"""The watch over the other ranks of this job, stages in which one rank works alone, and time limits of collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_lion.collective_faults import one_line
from megatron_lion.errors import PeerError
from megatron_lion.peer_board import open_board
from megatron_lion.peer_watch import PeerWatch

ALONE_LIMIT_S = 24 * 3600.0
"""Time limit of collectives in a stage in which one rank may work alone, seconds: they wait while that rank lives."""

_watch: PeerWatch | None = None
"""The watch of this process's job, as torch.distributed's default group: one at a time."""
_number = 0


@contextmanager
def watched(timeout_s: float) -> Iterator[PeerWatch | None]:
    """Watches the peers of the default process group while the block runs; yields None if there are none."""
    global _watch, _number
    _number += 1
    board = None
    if dist.get_world_size() > 1:
        try:
            board = open_board(_number)
        except (OSError, RuntimeError) as error:
            raise PeerError(f"the job's store does not answer: {one_line(error)}") from error
    if board is None or _watch is not None:
        yield None
        return
    _watch = watch = PeerWatch(board, dist.get_rank(), dist.get_world_size(), timeout_s, dist.get_backend())
    try:
        watch.start()
        yield watch
        watch.end("done")
        if dist.get_rank() == 0:
            board.remove()
    finally:
        watch.stop()
        _watch = None


def mark(stage: str | None = None) -> None:
    """Notes for the peers that this rank has made progress, and optionally its new stage ("step 12"); returns at once."""
    if _watch is not None:
        _watch.mark(stage)


@contextmanager
def alone(stage: str, *, mute: bool = False) -> Iterator[None]:
    """Marks a stage in which one rank may work while the others wait for it, as long as it lives; used on all ranks.

    In the block collectives of the default group wait up to ALONE_LIMIT_S instead of parallel.timeout_s. The watch
    ends the job if a rank dies, stops or sends no sign of life for that time.

    Args:
        stage: its name, for messages.
        mute: whether the working rank may be unable to send signs of life; then silence counts after MUTE_S only.
    """
    watch = _watch
    if watch is None:
        yield
        return
    before, worked, was_mute = watch.stage, watch.working, watch.mute
    watch.mute = mute or was_mute
    watch.mark(stage)
    watch.alone += 1
    if watch.alone == 1:
        set_timeout(ALONE_LIMIT_S)
    watch.working = True
    try:
        yield
        watch.mark(before)
    finally:
        watch.mute = was_mute
        watch.working = worked  # an outer block of this kind may still work
        watch.alone -= 1
        if watch.alone == 0:
            set_timeout(watch.timeout_s)


def waits() -> None:
    """Notes in a stage of `alone` that this rank's own work is done and only waiting is left."""
    if _watch is not None:
        _watch.working = False


def set_timeout(seconds: float) -> None:
    """Sets the time limit of later collectives of the default group."""
    # torch: the only way to change a group's limit, which megatron-core's update_pg_timeout uses too, but after a
    # barrier, and that would already wait for the working rank.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
