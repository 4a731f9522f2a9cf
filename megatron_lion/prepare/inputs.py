"""Opens and decompresses the input files of a corpus, which find_files.py finds and pieces.py reads."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from megatron_lion.errors import DataError, EnvironmentFault
from megatron_lion.prepare.find_files import InputFile


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Converts the exceptions of a damaged or unreadable file in the block to a DataError that names the file."""
    try:
        yield
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
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
        return io.BufferedReader(_Streams(lzma.LZMADecompressor, stored, padding=4), 1 << 20)
    if file.compression == ".bz2":
        return io.BufferedReader(_Streams(bz2.BZ2Decompressor, stored), 1 << 20)
    if file.compression == ".zst":
        return io.BufferedReader(_ZstdStream(optional_package("zstandard", file.path), stored), 1 << 20)
    return stored


class _Streams(io.RawIOBase):
    """Decompressed content of a .xz or .bz2 file of one or more streams.

    Python's own readers end without an error at bytes that are no further stream, so damage there would lose data.
    """

    def __init__(self, new: Callable[[], Any], stored: IO[bytes], padding: int = 0) -> None:
        """Opens the stream.

        Args:
            new: makes the decompressor of one stream.
            stored: the stored file.
            padding: zero bytes in multiples of this number may follow a stream; 0 allows none.
        """
        self._new, self._stored, self._padding = new, stored, padding
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = b""
        while not content:
            stored = b""
            if self._stream.eof:
                stored = self._next_stream()
                if not stored:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input:
                stored = self._stored.read(1 << 16)
                if not stored:
                    raise EOFError("the compressed data end within a stream")
            try:
                content = self._stream.decompress(stored, len(view))
            except OSError as error:  # of bz2; it would read as a failure of the disk
                raise ValueError(str(error)) from None
        view[: len(content)] = content
        return len(content)

    def _next_stream(self) -> bytes:
        """Returns the first stored bytes after a stream and its padding, or nothing at the end of the file."""
        stored, zeros = self._stream.unused_data, 0
        while True:
            stored = stored or self._stored.read(1 << 16)
            rest = stored.lstrip(b"\0") if self._padding else stored
            zeros += len(stored) - len(rest)
            if not stored or rest:
                break
            stored = b""
        if self._padding and zeros % self._padding:
            raise ValueError(
                f"the number of zero bytes after the compressed data, {zeros}, is no multiple of {self._padding}"
            )
        return rest


class _ZstdStream(io.RawIOBase):
    """Decompressed content of a .zst file of one or more frames.

    If the file is cut short, this stream raises EOFError; the library's own stream reader ends without an error.
    """

    def __init__(self, library: Any, stored: IO[bytes]) -> None:
        self._library = library
        self._stored = stored
        self._frame = self._decompressor()
        self._in_frame = False
        self._content = memoryview(b"")

    def _decompressor(self) -> Any:
        # Files of `zstd --long=31` need a window of 2 GiB. Only a frame that needs it allocates it.
        return self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            # 16 KiB at a time: they can decompress to half a gigabyte of repeated bytes, all held in memory.
            stored = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = self._decompressor(), False
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
