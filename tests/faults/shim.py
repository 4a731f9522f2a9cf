"""Faults of shim.c: their kinds, the library's build, and how a process is armed.

A fault belongs to one process and one folder. The calls that change files below the folder are counted from 1; the fault
is injected into call `at`:

    kill    SIGKILL before the call            after   SIGKILL after the call
    half    half of a write, then SIGKILL      short   half of a write, and its count is returned
    once    the call fails with an errno       always  so do all later calls
    flip    one bit of a write is inverted     slow    each write from there on waits
    stop    SIGSTOP before the call            signal  a signal to the process before the call
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("count", "kill", "after", "half", "once", "always", "short", "flip", "stop", "signal", "slow")
REMOVES = ("unlink", "rmdir", "ftruncate")


@dataclass(frozen=True)
class Fault:
    """A fault for one process.

    Attributes:
        root: absolute path of the folder whose calls are counted.
        kind: one of KINDS; "count" injects nothing.
        at: number of the call, from 1.
        number: errno of once and always; signal's number; milliseconds of slow.
        log: file that receives a line for each counted call, or "".
        shadow: folder that receives a copy of what each fsync made durable, or "".
    """

    root: str
    kind: str = "count"
    at: int = 0
    number: int = 0
    log: str = ""
    shadow: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def environment(self, rank: int | None = None) -> dict[str, str]:
        """Variables that arm a new process; with `rank`, only the process of that rank."""
        variables = {
            "LD_PRELOAD": str(library()), "FAULT_ROOT": self.root, "FAULT_KIND": str(KINDS.index(self.kind)),
            "FAULT_AT": str(self.at), "FAULT_NUMBER": str(self.number), "FAULT_LOG": self.log, "FAULT_SHADOW": self.shadow,
        }  # fmt: skip
        return variables if rank is None else {**variables, "FAULT_RANK": str(rank)}

    def arm(self) -> None:
        """Arms this process, which must have been started with the library preloaded."""
        handle = ctypes.CDLL(None)
        handle.shim_arm.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_int, ctypes.c_int, ctypes.c_long]
        code = handle.shim_arm(
            *(part.encode() for part in (self.root, self.shadow, self.log)),
            KINDS.index(self.kind),
            self.number,
            self.at,
        )
        if code:
            raise OSError(code, os.strerror(code), self.log)


@dataclass(frozen=True)
class Call:
    """A counted call: number, operation, bytes of a write, path (of a rename: "old -> new")."""

    number: int
    op: str
    size: int
    path: str

    def takes(self, kind: str, number: int = 0) -> bool:
        """Whether shim.c injects such a fault into this call (its function `refuses`)."""
        if kind in ("half", "short", "flip"):
            return self.op == "write" and self.size > (kind != "flip")
        if kind in ("once", "always") and number in (errno.ENOSPC, errno.EDQUOT):
            return self.op not in (*REMOVES, "open")
        if kind in ("once", "always") and number == errno.EROFS:
            return self.op not in ("write", "fsync")
        return True


def library() -> Path:
    """Compiles shim.c, once for each content of it, and returns the library's path."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"megatron-lion-shim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"shim-{digest}.so"
    if not path.is_file():
        compiler = shutil.which("cc") or shutil.which("g++") or "cc"
        beside = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-x", "c", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(beside), "-ldl"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        os.replace(beside, path)
    return path


def read_log(path: str | Path) -> tuple[list[Call], bool]:
    """Returns the calls of a log, and whether a fault was injected."""
    calls, injected = [], False
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        if line.startswith("! "):
            injected = True
        else:
            number, op, size, name = line.split(" ", 3)
            calls.append(Call(int(number), op, int(size), name))
    return calls, injected
