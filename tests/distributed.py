"""Runs a function on several processes with a real process group (gloo, or nccl on GPUs).

The processes are forked from a server that imported torch and megatron-core once: starting four takes 0.3 s, where
importing in each takes 10 s and more.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the server; it starts with the first call and ends with the test session.
multiprocessing.set_forkserver_preload(["megatron_lion.train.loop"])


def _worker(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    multiprocessing.set_start_method(None, force=True)  # a run starts its loader workers as it does outside of tests
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is never garbage: collecting in here is then quick
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= world_size else "gloo"
    store = dist.FileStore(os.path.join(folder, "rendezvous"), world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save(fn(rank, *args), os.path.join(folder, f"result{rank}.pt"))
        dist.barrier()
    except BaseException:
        Path(folder, f"error{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # peers may sit in a collective: do not wait for them
    dist.destroy_process_group()


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Runs `fn(rank, *args)` on `world_size` new processes and returns their results in rank order.

    `fn` must be importable (module level) and return something torch.save can write with tensors and plain values.

    Raises:
        AssertionError: a rank raised; carries that rank's traceback.
        TimeoutError: the processes did not end within `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _worker, args=(fn, world_size, folder, args), nprocs=world_size, join=False, start_method="forkserver"
        )
        try:
            deadline = timeout_s
            while not context.join(timeout=5):
                deadline -= 5
                if deadline <= 0:
                    raise TimeoutError(f"{fn.__name__} on {world_size} processes did not end within {timeout_s} s")
        except (mp.ProcessExitedException, mp.ProcessRaisedException):
            errors = "\n".join(p.read_text() for p in sorted(Path(folder).glob("error*.txt")))
            raise AssertionError(errors or "a rank died without a traceback") from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(os.path.join(folder, f"result{r}.pt"), weights_only=False) for r in range(world_size)]
