"""Compiles a C++ file of this folder into a shared library, once for each machine, and loads it.

The library is kept in `$XDG_CACHE_HOME/megatron-lion` (`~/.cache/megatron-lion`). Its name is a hash of source, compiler,
flags and processor. If several processes need it at the same time, one builds it and the others wait. It is renamed into
place when it is complete. If the folder cannot be written or used, each process builds a library for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_lion.errors import BusyError, StorageError
from megatron_lion.files import file_lock

COMPILERS = ("c++", "g++", "clang++")
# No flag lets the compiler change a result: no fused multiply-add, no other order; NaN and the sign of 0 are kept.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The library cannot be built or loaded, or it computes other bits than the reference."""


class Library:
    """The library of a C++ file of this folder: built when it is first needed, compared with its reference, kept for the process."""

    def __init__(
        self, name: str, differs: Callable[[ctypes.CDLL], str | None], instead: str, logger: logging.Logger
    ) -> None:
        """Describes the library; builds nothing.

        Args:
            name: name of the file.
            differs: compares the loaded library with its reference; returns what it computes otherwise, or None.
            instead: what happens without the library, for the warning.
            logger: receives the warning.
        """
        self.name, self.differs, self.instead, self.logger = name, differs, instead, logger
        self.forget()

    def forget(self) -> None:
        """Forgets what this process has found; for tests."""
        self._loaded: ctypes.CDLL | None = None
        self._reason: str | None = None
        self._is_built: bool | None = None

    def load(self) -> ctypes.CDLL:
        """Returns the library; the first call of a process builds it and compares it with the reference.

        Raises:
            BuildError: there is no compiler, it fails, or its code computes something else than the reference.
        """
        if self._loaded is None:
            built = build_library(self.name)
            if other := self.differs(built):
                raise BuildError(
                    f"the compiled code computes other {other} than the reference; set CXX to another compiler"
                )
            self._loaded = built
        return self._loaded

    def why_not(self) -> str | None:
        """Returns the reason the library is unavailable, or None. Logged once."""
        if self._loaded is None and self._reason is None:
            try:
                self.load()
            except BuildError as error:
                self._reason = str(error)
                self.logger.warning("%s: %s", self.instead, error)
        return self._reason

    def is_built(self) -> bool:
        """Returns whether the library was there when the process asked first, so that using it compiles nothing."""
        if self._is_built is None:
            self._is_built = is_kept(self.name)
        return self._is_built


def build_library(name: str) -> ctypes.CDLL:
    """Returns the library built from the file `name` of this folder.

    Raises:
        BuildError: it cannot be built or loaded on this machine; the message has the reason.
    """
    source = Path(__file__).with_name(name)
    compiler = _compiler()
    try:
        target = _kept(source, compiler)
        if target.exists():  # whole, because it was renamed into place; a machine that has it writes nothing
            return _load(target)
        folder = target.parent
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_suffix(".lock")):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    # On the same file system, so the rename is atomic: no process can load half a library.
                    os.replace(_compile(compiler, source, Path(scratch)), target)
        return _load(target)
    except (OSError, BusyError):  # the folder is read-only, full or mounted noexec, or its lock is never released
        try:
            # The folder may be removed after loading: the process keeps the file mapped.
            with tempfile.TemporaryDirectory(prefix="megatron-lion-") as scratch:
                return _load(_compile(compiler, source, Path(scratch)))
        except OSError as error:
            raise BuildError(f"{source.name} cannot be built or loaded: {error}") from error


def is_kept(name: str) -> bool:
    """Returns whether the library of the file `name` was built before; compiles, loads and writes nothing."""
    try:
        return _kept(Path(__file__).with_name(name), _compiler()).exists()
    except (OSError, BuildError):  # no folder, or no compiler to name the library after
        return False


def _kept(source: Path, compiler: list[str]) -> Path:
    """Returns where the library is kept."""
    return _cache_folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library. If it was linked with -ffast-math, loading flushes subnormals to 0 in the process; this is undone."""
    had_subnormals = _has_subnormals()
    library = ctypes.CDLL(str(path))
    if had_subnormals and not _has_subnormals():
        torch.set_flush_denormal(False)
    return library


def _has_subnormals() -> bool:
    return sys.float_info.min / 2 > 0


def _compiler() -> list[str]:
    """Returns the compile command: CXX, which may hold arguments or a wrapper, or the first compiler on the path."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        command = shlex.split(name)
        if shutil.which(command[0]) is not None:
            return command
    raise BuildError(f"no C++ compiler ({wanted or ', '.join(COMPILERS)}) on the path; install one or set CXX")


def _compile(compiler: list[str], source: Path, folder: Path) -> Path:
    output = folder / "built.so"
    message = ""
    for native in (("-march=native",), ()):  # some compilers reject it for some processors
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
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-lion"
    except RuntimeError as error:  # Path.home(): there is no home folder
        raise OSError(str(error)) from error


def _fingerprint(source: Path, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    texts = (" ".join(compiler), " ".join(FLAGS), _processor())
    parts = [source.read_bytes(), version, *(text.encode() for text in texts)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Returns what `-march=native` depends on, because machines of different kinds may share a home folder."""
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
    """Lets one process build at a time if the file system can lock; otherwise each builds the same library.

    Raises:
        BusyError: another process has held the lock for longer than a build may take.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(StorageError):  # of taking the lock only; errors of the block itself propagate
            # A build is at most two compilations, with and without -march=native; a minute is for the rest.
            stack.enter_context(file_lock(path, str(path), "end that process", wait_s=2 * TIMEOUT_S + 60))
        yield
