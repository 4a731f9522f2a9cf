"""Compiles a C++ file beside this one into a library, once for each machine, and loads it.

The library is kept in `$XDG_CACHE_HOME/megatron-lion` (`~/.cache/megatron-lion`) under a name made from source, compiler,
flags and processor. Processes that need it at the same time wait for one of them; a library appears there whole, by
renaming. Where the folder cannot be written or used, each process builds for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_lion.errors import BusyError, StorageError
from megatron_lion.files import file_lock

COMPILERS = ("c++", "g++", "clang++")
# Nothing here lets the compiler change a result: no fused multiply-add, no other order, NaN and the sign of 0 kept.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def build_library(name: str) -> ctypes.CDLL:
    """The library made from the file `name` of this folder.

    Raises:
        BuildError: it cannot be built or loaded here; the message says why.
    """
    source = Path(__file__).with_name(name)
    compiler = _compiler()
    try:
        folder = _cache_folder()
        target = folder / f"{source.stem}-{_fingerprint(source, compiler)}.so"
        with _alone(target.with_suffix(".lock")):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    os.replace(_compile(compiler, source, Path(scratch)), target)
        return _load(target)
    except (OSError, BusyError):  # a folder that is read-only, full, or mounted so that nothing in it is executed
        try:
            with tempfile.TemporaryDirectory(prefix="megatron-lion-") as scratch:
                return _load(_compile(compiler, source, Path(scratch)))
        except OSError as error:
            raise BuildError(f"{source.name} cannot be built or loaded: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library. One that was linked for -ffast-math flushes subnormal numbers to 0 in the whole process: that is undone."""
    had_subnormals = _has_subnormals()
    library = ctypes.CDLL(str(path))
    if had_subnormals and not _has_subnormals():
        torch.set_flush_denormal(False)
    return library


def _has_subnormals() -> bool:
    return sys.float_info.min / 2 > 0


def _compiler() -> list[str]:
    """The command that compiles: CXX, which may carry arguments or a wrapper, or the first that is found."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        command = shlex.split(name)
        if shutil.which(command[0]) is not None:
            return command
    raise BuildError(f"no C++ compiler ({wanted or ', '.join(COMPILERS)}) on the path; install one or set CXX")


def _compile(compiler: list[str], source: Path, folder: Path) -> Path:
    output = folder / "built.so"
    message = ""
    for native in (("-march=native",), ()):  # not every compiler and processor knows it
        command = [*compiler, *FLAGS, *native, str(source), "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler[0]} did not end within {TIMEOUT_S} s") from None
        if done.returncode == 0 and output.exists():
            return output
        message = message or next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
    raise BuildError(f"{compiler[0]} failed: {message}")


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-lion"
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fingerprint(source: Path, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    texts = (" ".join(compiler), " ".join(FLAGS), _processor())
    parts = [source.read_bytes(), version, *(text.encode() for text in texts)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on; a home folder may be shared by several kinds of machine."""
    lines = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
        for line in cpuinfo:
            if not line.strip():
                break
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                lines.append(line)
    return "".join(lines)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process after another build, if the file system can lock; otherwise all build the same library.

    Raises:
        BusyError: another process has had the lock for longer than a build may take.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(StorageError):  # only of the lock: the block's own errors pass
            stack.enter_context(file_lock(path, str(path), "end that process", wait_s=2 * TIMEOUT_S + 60))
        yield
