"""A process that imported the product once, with the shim preloaded, and forks the processes that a case asks for.

A request is one line of JSON on the socket: the work, its arguments, environment, fault, and files for the output. The
answer is the pid; when the process ends, a line reports its status and the time. warm.py is the other side.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any


def main(descriptor: int) -> None:
    """Serves requests until the socket is closed; then kills what still runs."""
    import torch

    torch.set_num_threads(1)
    for name in (
        "cli",
        "train.loop",
        "commands.pretrain",
        "evaluate.open_run",
        "interop.hf_export",
        "prepare.pipeline",
    ):
        try:
            importlib.import_module(f"megatron_lion.{name}")
        except ModuleNotFoundError:
            continue  # an import ahead of time saves seconds, and nothing depends on it
    gc.collect()
    gc.freeze()  # the imports are never garbage; without them a collection in a child is fast
    channel = socket.socket(fileno=descriptor)
    running = set[int]()
    # A process that ended without a word, as at Ctrl-C, closes the channel; nothing of it may stay.
    try:
        with contextlib.suppress(ConnectionError):
            _serve(channel, running)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _serve(channel: socket.socket, running: set[int]) -> None:
    """Starts what is asked for and reports what ended, until the channel is closed; `running` holds the processes."""
    channel.sendall(b'{"ready": true}\n')
    pending = b""
    while True:
        readable, _, _ = select.select([channel], [], [], 0.01)
        if readable:
            received = channel.recv(1 << 20)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                pid = _fork(channel, json.loads(line))
                running.add(pid)
                channel.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.discard(pid)
                answer = {"ended": pid, "code": os.waitstatus_to_exitcode(status), "time": time.monotonic()}
                channel.sendall(json.dumps(answer).encode() + b"\n")


def _fork(channel: socket.socket, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        channel.close()
        for descriptor, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            handle = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, descriptor)
            os.close(handle)
        os.setpgid(0, 0)
        os.environ.update(request["environment"])
        module, _, name = request["work"].partition(":")
        work = getattr(importlib.import_module(module), name)
        if request["fault"]:
            from faults.shim import Fault

            Fault(**request["fault"]).arm()
        code = int(work(*request["arguments"]) or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
