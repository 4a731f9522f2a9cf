"""Opens the input files of a corpus, which find_files.py finds and pieces.py reads."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_lion.errors import DataError
from megatron_lion.prepare.decompression import RatioError, decompressed
from megatron_lion.prepare.find_files import InputFile


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Converts the exceptions of damaged or unreadable data in the block to a DataError that names the file.

    Args:
        where: path of the file, with the name of the archive's member if it is one.
    """
    try:
        yield
    except RatioError as error:
        raise DataError(f"{where}: {error}") from None
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{where}: damaged or cut short: {error}; download it again") from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from None


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file and yields (stream of its decompressed bytes, stream of the stored file).

    The position of the second stream shows the progress.

    Raises:
        EnvironmentFault: the file ends in .zst and the package zstandard is not installed.
    """
    with (
        open(file.path, "rb", buffering=1 << 20) as stored,
        decompressed(file.compression, stored, file.path) as stream,
    ):
        yield stream, stored
