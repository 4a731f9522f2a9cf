"""Which exceptions of torch mean a lost peer, which a lost loader worker, and which a fault of this machine."""

from __future__ import annotations

import re
import signal

import torch.distributed as dist

from megatron_lion.errors import EnvironmentFault, MegatronLionError, PeerError, WorkerError

# What gloo, NCCL and the stores write if the other side is missing. gloo raises plain RuntimeErrors, so the text decides.
_LOST = re.compile(
    r"connection (was )?closed by (remote )?peer|connection reset|connection closed|broken pipe|socket closed|timed out|"
    r"time ?out|connection refused|no route to host|network is unreachable|host is down|remote (process|error)|"
    r"remoteerror|communicator was aborted|failed to recv|clients joined|failed to connect|ncclinprogress",
    re.IGNORECASE,
)
# What they write if this machine itself is at fault; wins over _LOST.
_OWN = re.compile(
    r"out of memory|unhandled cuda error|cuda (driver|failure|error)|no socket interface|unable to find (address|interface)|"
    r"unable to resolve|no space left|invalid (usage|config|argument)|duplicate gpu|address already in use|eaddrinuse|"
    r"failed to (bind|listen)|no nccl|not (built|compiled) with|environment variable|too many open files|"
    r"cannot allocate memory|no such device",
    re.IGNORECASE,
)
_WORKER = re.compile(
    r"^DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)
_BACKEND = re.compile(r"gloo|nccl", re.IGNORECASE)
# How gloo begins its plain RuntimeErrors: "[enforce fail at …/gloo/transport/tcp/loop.cc:48] …", "Gloo connect…".
_BY_BACKEND = re.compile(r"\[[^\]]*(gloo|nccl)|gloo ", re.IGNORECASE)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an exception without line breaks and without the C++ stack that torch appends."""
    text = re.split(r"\n?Exception raised from |\nC\+\+ CapturedTraceback", str(error))[0]
    return " ".join(text.split())[:limit]


def is_collective_fault(error: BaseException) -> bool:
    """Whether an exception of a block with collectives means that a peer is lost or late.

    False for faults of this rank: memory, shapes, a dead loader worker, an error in a file.
    """
    if not isinstance(error, RuntimeError) or _OWN.search(str(error)):
        return False
    if isinstance(error, dist.DistError):
        return True
    return bool(_BACKEND.search(str(error)) and _LOST.search(str(error)))


def is_own_fault(error: BaseException) -> bool:
    """Whether torch.distributed failed because of this machine: memory, driver, network interface, limit of open files."""
    text = str(error)
    by_torch = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BY_BACKEND.match(text)))
    return by_torch and bool(_OWN.search(text))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective fault is an expired time limit; otherwise the connection broke."""
    return bool(re.search(r"timed out|time ?out", str(error), re.IGNORECASE))


def start_fault(error: BaseException) -> MegatronLionError:
    """The error to report for an exception of `init_process_group`.

    A missing peer is a PeerError. Everything else (driver, memory, network interface, a variable that is not set, a
    taken port) is an EnvironmentFault with the text of the backend.
    """
    text = one_line(error)
    if not _OWN.search(text) and _LOST.search(text):
        return PeerError(f"the processes of this job did not find each other: {text}")
    hint = "; raise the limit, for example with `ulimit -n 1024`" if "too many open files" in text.lower() else ""
    return EnvironmentFault(
        f"the communication between processes cannot start on this machine: {type(error).__name__}: {text}{hint}"
    )


def worker_fault(error: BaseException) -> WorkerError | None:
    """The error to report if an exception is torch's about a loader worker that was killed or ended; otherwise None.

    torch raises it in a handler of SIGCHLD, so in any line of the main thread, once for each worker: also while an earlier
    one is handled. A loader that waits raises one without the signal. An exception of the worker's own code has another
    text: "Caught … in DataLoader worker".
    """
    text: re.Match[str] | None = None
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, WorkerError):
            return link
        if isinstance(link, RuntimeError) and (found := _WORKER.search(str(link))):
            text = found if text is None or found[2] else text
        elif link is error and not isinstance(error, OSError | EOFError):
            return None  # another error, whatever it was raised after
        link = link.__cause__ or link.__context__
    if text is None:
        return None
    if killed_because:
        return WorkerError(killed_because[0])
    names = {signal.strsignal(number): number.name for number in signal.Signals}
    return lost_worker(text[1], names.get(text[2], text[2]) if text[2] else None)


killed_because: list[str] = []
"""Why this process has killed its own loader workers, if it has: then that is the fault, and not their end."""


def lost_worker(pids: str, signal_name: str | None) -> WorkerError:
    """The error to report for loader workers that ended by themselves or by a signal, such as "SIGKILL"."""
    how = f"was ended by {signal_name}" if signal_name else "ended unexpectedly"
    return WorkerError(
        f"the data loader's worker process (pid {pids}) {how}; if no user did that, memory or shared memory (/dev/shm) probably "
        "ran out: use fewer data.num_workers; the same command continues from what is saved"
    )
