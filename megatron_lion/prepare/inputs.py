"""Finds the input files of a corpus and opens them, decompressed.

Formats: JSON lines (`.jsonl`, `.ndjson`, `.json`), plain text (`.txt`, `.text`) and Parquet (`.parquet`). The first two
may be compressed (`.gz`, `.zst`, `.xz`, `.bz2`). pieces.py cuts the files into pieces and reads the documents.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_lion.errors import ConfigError, DataError, EnvironmentFault

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        path: path of the file.
        format: "jsonl", "txt" or "parquet".
        compression: ending of the compression such as ".gz", or "".
        bytes: size as stored.
        modified_ns: time of the last modification in nanoseconds.
    """

    path: Path
    format: str
    compression: str
    bytes: int
    modified_ns: int


def find_inputs(inputs: Sequence[str | Path], format: str = "auto") -> list[InputFile]:
    """Returns the files that a list of files, folders and glob patterns names.

    Folders are searched to any depth for known endings. The files of a folder or pattern are sorted by path; the order
    of the list is kept.

    Args:
        inputs: files, folders or glob patterns.
        format: "auto" for the format of each file's ending, or "jsonl", "txt", "parquet" for all files.

    Raises:
        ConfigError: the list is empty.
        DataError: a path or pattern matches no file, an ending is unknown, or a file occurs twice.
    """
    found: list[InputFile] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            paths = sorted(inner for inner in path.rglob("*") if inner.is_file() and _kind(inner) is not None)
            if not paths:
                raise DataError(f"{given}: no file in this folder ends in {', '.join(FORMATS)} (or these + .gz, .zst)")
        elif path.is_file():
            paths = [path]
        else:
            paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
            if not paths:
                raise DataError(f"{given}: no such file or folder, and no file matches it as a pattern")
        found += [input_file(path, format) for path in paths]
    if not found:
        raise ConfigError("no input given; name at least one file: --input FILE")
    seen: set[Path] = set()
    for file in found:
        real = file.path.resolve()  # also finds a file that is named by two links
        if real in seen:
            raise DataError(f"{file.path}: named twice, so its documents would be counted twice; name it once")
        seen.add(real)
    return found


def _kind(path: Path) -> tuple[str, str] | None:
    """Returns (format, compression) by the path's endings, or None if the ending is unknown."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    ending = Path(path.stem).suffix if compression else path.suffix
    kind = FORMATS.get(ending.lower())
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def input_file(path: Path, format: str = "auto") -> InputFile:
    """Returns the description of one file.

    Args:
        path: path of the file.
        format: as for `find_inputs`.

    Raises:
        DataError: the file cannot be read, or its ending is unknown with "auto".
    """
    kind = _kind(path)
    if format != "auto":
        kind = (format, path.suffix if path.suffix in COMPRESSIONS and format != "parquet" else "")
    if kind is None:
        endings = ", ".join(FORMATS)
        raise DataError(f"{path}: unknown ending {path.suffix!r}; known: {endings}; or give --format jsonl|txt|parquet")
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return InputFile(path, *kind, bytes=status.st_size, modified_ns=status.st_mtime_ns)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Converts the exceptions of a damaged or unreadable file in the block to a DataError that names the file."""
    try:
        yield
    except (EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: damaged or cut short: {error}; download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file and yields (stream of its decompressed bytes, stream of the stored file).

    The position of the second stream shows the progress.

    Raises:
        EnvironmentFault: the file ends in .zst and the package zstandard is not installed.
    """
    with open(file.path, "rb", buffering=1 << 20) as stored, _decompressing(file, stored) as stream:
        yield stream, stored


def _decompressing(file: InputFile, stored: IO[bytes]) -> IO[bytes]:
    if file.compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stored, mode="rb"))
    if file.compression == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(stored))
    if file.compression == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(stored))
    if file.compression == ".zst":
        return io.BufferedReader(_ZstdStream(optional_package("zstandard", file.path), stored), 1 << 20)
    return stored


class _ZstdStream(io.RawIOBase):
    """Decompressed content of a .zst file of one or more frames.

    If the file is cut short, this stream raises EOFError; the library's own stream reader ends without an error.
    """

    def __init__(self, library: Any, stored: IO[bytes]) -> None:
        self._library = library
        self._stored = stored
        self._frame = self._library.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            # 16 KiB at a time: they can decompress to half a gigabyte of repeated bytes, all held in memory.
            stored = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = self._library.ZstdDecompressor().decompressobj(), False
            stored = stored or self._stored.read(1 << 14)
            if not stored:
                if self._in_frame:
                    raise EOFError("the compressed data end within a frame")
                return 0
            self._in_frame = True
            try:
                self._content = memoryview(self._frame.decompress(stored))
            except self._library.ZstdError as error:
                raise ValueError(str(error)) from None
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._content))
        view[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def optional_package(module: str, path: Path) -> Any:
    """Imports and returns a module that only some formats need.

    Args:
        module: name of the module.
        path: input file that needs it, for the message.

    Raises:
        EnvironmentFault: the package is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EnvironmentFault(
            f'{path}: reading it needs the package {module}: pip install "megatron-lion[data]"'
        ) from None
