"""Decompresses the input files of a corpus and the members of its archives, up to a limit of what comes out."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, cast

from megatron_lion.errors import EnvironmentFault

MAX_RATIO = 200
"""Bytes that may come out for each stored byte, after the first `FREE_BYTES`; English text gives 2 to 10."""
FREE_BYTES = 1 << 26


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Returns `size` bytes, or fewer at the end."""


class RatioError(ValueError):
    """Raised if so much comes out of compressed data that they are no text: a decompression bomb."""


def decompressed(compression: str, stored: IO[bytes], where: str | Path, buffer_bytes: int = 1 << 20) -> IO[bytes]:
    """Returns the decompressed content of a stream; `stored` itself if it is not compressed.

    Reading it raises EOFError or ValueError if the data are damaged or cut short, and RatioError if they are a bomb.

    Args:
        compression: ".gz", ".zst", ".xz", ".bz2", or "".
        stored: the stored bytes.
        where: what is read, for the message.
        buffer_bytes: number of bytes that are decompressed at once.

    Raises:
        EnvironmentFault: zstandard is needed and not installed.
    """
    if not compression:
        return stored
    counted = _Counted(stored)
    if compression == ".gz":
        inner: Any = gzip.GzipFile(fileobj=cast(Any, counted), mode="rb")
    elif compression == ".xz":
        inner = _Streams(lzma.LZMADecompressor, counted, padding=4)
    elif compression == ".bz2":
        inner = _Streams(bz2.BZ2Decompressor, counted)
    else:
        inner = _ZstdStream(optional_package("zstandard", where), counted)
    return io.BufferedReader(_Limited(inner, counted), buffer_bytes)


class _Counted:
    """Counts the bytes that are read from a stream."""

    def __init__(self, stored: Readable) -> None:
        self._stored = stored
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stored.read(size)
        self.count += len(data)
        return data


class _Limited(io.RawIOBase):
    """Passes a decompressed stream on, unless more comes out than a text can give."""

    def __init__(self, inner: Any, stored: _Counted) -> None:
        self._inner, self._stored = inner, stored
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._inner.readinto(buffer))
        self._count += count
        if self._count - FREE_BYTES > MAX_RATIO * self._stored.count:
            raise RatioError(
                f"is compressed {self._count / max(self._stored.count, 1):,.0f} to 1 so far, which no text is; the limit is "
                f"{MAX_RATIO} to 1 after {FREE_BYTES >> 20} MiB; if it is right, decompress it first"
            )
        return count


class _Streams(io.RawIOBase):
    """Decompressed content of a .xz or .bz2 file of one or more streams.

    Python's own readers end without an error at bytes that are no further stream, so damage there would lose data.
    """

    def __init__(self, new: Callable[[], Any], stored: Readable, padding: int = 0) -> None:
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

    def __init__(self, library: Any, stored: Readable) -> None:
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
            # 4 KiB at a time: they can decompress to 128 MiB of repeated bytes, all held in memory.
            stored = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = self._decompressor(), False
            stored = stored or self._stored.read(1 << 12)
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


def optional_package(module: str, path: str | Path) -> Any:
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
