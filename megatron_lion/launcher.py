"""Starts a subcommand on several processes: `python -m megatron_lion.launcher --processes N VERB …`.

It takes the place of torchrun, whose agent opens ports on all interfaces and unpickles what it reads there.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which fail on an old Python and without the packages
    import sys

    from megatron_lion.installation import check

    check(sys.argv[1:], "megatron_lion.launcher")

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_lion.errors import ConfigError, MegatronLionError, PeerError, StoppedOnRequest
from megatron_lion.files import storage_errors
from megatron_lion.folder_swap import locked_folder
from megatron_lion.jobs import STORE
from megatron_lion.signals import collected, end_with_parent, signal_name
from megatron_lion.streams import guard_streams, say
from megatron_lion.supervise import Cause, Rank, find_cause, watch

if TYPE_CHECKING:
    from megatron_lion.nodes import Nodes

STOP_TIMEOUT_S = 1800.0
PRIVATE = "megatron-lion-job-"
"""How the names of the launchers' private folders begin."""
_TORCH_LOG = "TORCH_CPP_LOG_LEVEL"


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (docs/exit-codes.md).

    Args:
        words: the words of the command line; default: sys.argv without the program.
    """
    with collected() as received:  # before anything else: a stop signal ends the start at once
        try:
            cause = _launch(_parse(words), received)
        except MegatronLionError as error:
            cause = Cause(error.exit_code, str(error))
    if cause.code and not cause.printed:
        say(f"megatron-lion: {cause.message}")
    return cause.code


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_lion.launcher",
        description="Starts a subcommand of megatron-lion on several processes of this machine, or of several nodes "
        "(docs/launching.md lists the environment variables).",
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="processes on this node; 0: one for each visible GPU, 2 without GPUs"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job; the same line runs on each")
    parser.add_argument("--check", action="store_true", help="first check the settings once, by the verb's --dry-run")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB …", help="the subcommand and its arguments")
    found = parser.parse_args(words)
    if not found.command or found.processes < 0 or found.nodes < 1:
        parser.error("give a VERB, --processes of 0 or more and --nodes of at least 1")
    return found


def _launch(options: argparse.Namespace, received: list[int]) -> Cause:
    stop_timeout_s = _seconds("STOP_TIMEOUT", STOP_TIMEOUT_S)
    if options.nodes > 1:
        _import_nodes().check_variables(os.environ)
    processes = options.processes or count_processes(received)
    with _private_folder() as (folder, kept):
        if options.check:
            _check(options, processes, received)
        if options.nodes == 1:
            variables = {STORE: str(folder / "store"), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
            return _run(options.command, range(processes), processes, processes, variables, folder, kept, received,
                        stop_timeout_s, None)  # fmt: skip
        with _import_nodes().Nodes(options.nodes, processes, os.environ, lambda: _end_if_asked(received)) as nodes:
            cause = _run(options.command, nodes.ranks, nodes.world_size, processes, nodes.variables(), folder, kept,
                         received, stop_timeout_s, nodes)  # fmt: skip
            return nodes.agree(cause)


def _import_nodes() -> ModuleType:
    """Imports the part for several nodes, and torch with it, whose C++ log is off in this process.

    If the store does not answer, that log has a page of C++ frames for each attempt, and then this launcher reports the
    reason in one line. torch reads the variable when it is imported; the ranks do not inherit it.
    """
    given = os.environ.get(_TORCH_LOG)
    os.environ.setdefault(_TORCH_LOG, "FATAL")
    try:
        from megatron_lion import nodes
    finally:
        if given is None:
            del os.environ[_TORCH_LOG]
    return nodes


@contextmanager
def _private_folder() -> Iterator[tuple[Path, list[int]]]:
    """Makes a folder that is private to this user and removed at the end.

    The ranks inherit its lock, because they use it while they save after their launcher was killed. The next launcher
    removes a folder that nobody has locked.

    Yields:
        The folder, and the descriptors for the ranks to inherit.
    """
    with ExitStack() as stack:
        with storage_errors("the folder for temporary files (TMPDIR)"):
            place = locked_folder(Path(tempfile.gettempdir()), PRIVATE, 0o700)
            found = stack.enter_context(place)
        yield found


def _run(
    command: list[str],
    numbers: range,
    world_size: int,
    processes: int,
    variables: dict[str, str],
    folder: Path,
    kept: list[int],
    received: list[int],
    stop_timeout_s: float,
    nodes: Nodes | None,
) -> Cause:
    base = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    base.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(processes), MEGATRON_LION_EXIT_DIR=str(folder))
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torch would open another store at them
        base.pop(name, None)
    _end_if_asked(received)
    ranks: list[Rank] = []
    try:
        for local, number in enumerate(numbers):
            own = {"RANK": str(number), "LOCAL_RANK": str(local)}
            ranks.append(Rank(number, [sys.executable, "-m", "megatron_lion", *command], {**base, **own}, kept))
        watch(ranks, received, stop_timeout_s, nodes)
    finally:
        for rank in ranks:  # only after an error of this launcher
            rank.kill()
    return find_cause(ranks, folder, interrupted=received.count(signal.SIGINT) > 1)


def count_processes(received: list[int]) -> int:
    """One process for each GPU that torch sees, and 2 without GPUs.

    torch counts, because nvidia-smi ignores CUDA_VISIBLE_DEVICES and lists MIG instances and their GPUs. Importing torch
    takes seconds, so it is skipped on a machine without NVIDIA's driver.
    """
    driver = any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl"))
    if not driver and shutil.which("nvidia-smi") is None:
        return 2
    code, out = _child([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], {}, received, True)
    return (int(out.split()[-1]) if code == 0 and out.split() else 0) or 2


def _check(options: argparse.Namespace, processes: int, received: list[int]) -> None:
    """Checks the settings once: an invalid one gives one message instead of one for each process."""
    words = [sys.executable, "-m", "megatron_lion", *options.command, "--dry-run"]
    # Empty counts as not set: this process may itself have a place in another job, which does not fit this one.
    variables = {"RANK": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "", "WORLD_SIZE": str(options.nodes * processes)}
    code, _ = _child(words, variables, received, False)
    if code < 0:
        raise PeerError(f"the check of the settings was ended by {signal_name(-code)}")
    if code:
        sys.exit(code)  # it has printed its line


def _child(words: list[str], variables: dict[str, str], received: list[int], read: bool) -> tuple[int, str]:
    """Runs a short command; a stop signal ends it at once. Returns its exit code and, if `read`, its stdout."""
    process = subprocess.Popen(
        words, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if read else sys.stderr,
        stderr=subprocess.DEVNULL if read else None, text=True, start_new_session=True, preexec_fn=end_with_parent(),
    )  # fmt: skip
    while True:
        try:
            out, _ = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            if received:
                process.kill()
    _end_if_asked(received)
    return process.returncode, out or ""


def _end_if_asked(received: list[int]) -> None:
    if received:
        name = signal.Signals(received[0]).name
        raise StoppedOnRequest(f"stopped by {name} before the job started; the same command starts it")


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={text}: give a time in seconds, above 0")
    return value


if __name__ == "__main__":
    guard_streams()
    sys.exit(main())
