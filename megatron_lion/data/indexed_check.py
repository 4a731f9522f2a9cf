"""Checks Megatron's `.bin/.idx` token files when they are opened; describes their binary layout.

PREFIX.bin contains the token ids of all sequences one after another. PREFIX.idx contains, little-endian:

    9 bytes  magic b"MMIDIDX\\0\\0"
    uint64   version, 1
    uint8    dtype of the ids: 8 = uint16 (vocabularies below 65,500), 4 = int32; other tools also write 1 = uint8,
             2 = int8, 3 = int16, 5 = int64
    uint64   S, number of sequences
    uint64   D, number of document boundaries = documents + 1
    int32    lengths[S], in tokens
    int64    pointers[S], byte offsets into PREFIX.bin
    int64    documents[D], index of the first sequence of each document, and S at the end

Source: megatron.core.datasets.indexed_dataset (megatron-core 0.19.2), byte for byte.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lion.data.index_arrays import HEADER, IndexArrays, find_fault
from megatron_lion.data.manifest import NAME as MANIFEST_NAME
from megatron_lion.data.manifest import SplitInfo, read_manifest
from megatron_lion.errors import DataError
from megatron_lion.files import sha256_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
"""The dtypes that this project writes, by Megatron's code."""
READABLE_CODES = {**DTYPE_CODES, 1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 5: np.dtype("<i8")}
"""All integer dtypes that Megatron reads."""
UINT16_VOCAB_LIMIT = 65500
_SCAN_TOKENS = 1 << 19


@dataclass(frozen=True)
class TokenContent:
    """SHA-256 of a token file in hexadecimal, and its smallest and largest id."""

    sha256: str
    low: int
    high: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the dtype in which Megatron stores the ids of a vocabulary of this size.

    >>> token_dtype(50257).name, token_dtype(100_000).name
    ('uint16', 'int32')
    """
    return DTYPE_CODES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPE_CODES[4]


@dataclass(frozen=True)
class IndexedInfo:
    """Contents of a checked pair of token files.

    Attributes:
        prefix: path without .bin/.idx.
        dtype: dtype of the token ids.
        num_documents, num_sequences, num_tokens: counts.
        bin_bytes, idx_bytes: sizes of the two files in bytes.
        listed: the pair's entry in the folder's manifest.json, or None.
    """

    prefix: Path
    dtype: np.dtype[Any]
    num_documents: int
    num_sequences: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int
    listed: SplitInfo | None = None

    @property
    def bin_path(self) -> Path:
        """Path of PREFIX.bin."""
        return with_ending(self.prefix, ".bin")

    @property
    def idx_path(self) -> Path:
        """Path of PREFIX.idx."""
        return with_ending(self.prefix, ".idx")

    @cached_property
    def bin_sha256(self) -> str:
        """SHA-256 of PREFIX.bin, computed on first access (about 1.9 GB/s)."""
        return sha256_file(self.bin_path)

    @cached_property
    def idx_sha256(self) -> str:
        """SHA-256 of PREFIX.idx, computed on first access."""
        return sha256_file(self.idx_path)

    @cached_property
    def content(self) -> TokenContent:
        """Hash and range of the ids of PREFIX.bin; the first access reads the file, once for both.

        Raises:
            DataError: the file cannot be read, or has another size than when it was checked.
        """
        try:
            return _read_content(self.bin_path, self.dtype, self.bin_bytes)
        except OSError as error:
            raise DataError(f"{self.bin_path}: cannot be read: {error.strerror}") from None

    @property
    def token_range(self) -> tuple[int, int]:
        """Smallest and largest token id; see `content`."""
        return self.content.low, self.content.high

    @property
    def max_token(self) -> int:
        """Largest token id; see `token_range`."""
        return self.token_range[1]

    def verify_content(self, rebuild: str | None = None) -> None:
        """Reads both files and compares their hashes with the folder's manifest.

        Args:
            rebuild: command that makes the files again, for messages; None builds one from the prefix.

        Raises:
            DataError: a hash differs, or no manifest lists the pair.
        """
        if self.listed is None:
            raise DataError(f"{self.prefix}: cannot be verified: no {MANIFEST_NAME} beside it lists this pair")
        for path, found, stated in (
            (self.idx_path, self.idx_sha256, self.listed.idx_sha256),
            (self.bin_path, self.bin_sha256, self.listed.bin_sha256),
        ):
            if found != stated:
                raise DataError(
                    f"{path}: sha256 is {found[:16]}…, in {MANIFEST_NAME} {stated[:16]}…: changed or damaged; "
                    f"{rebuild or rebuild_hint(self.prefix)}"
                )


def _read_content(path: Path, dtype: np.dtype[Any], size: int) -> TokenContent:
    digest, done, ends = hashlib.sha256(), 0, []
    tokens = np.empty(_SCAN_TOKENS, dtype)  # in parts: the file may be larger than memory
    block = memoryview(tokens.view(np.uint8))
    with open(path, "rb") as stream:
        while found := stream.readinto(block):  # buffered: each part but the last one is full
            digest.update(block[:found])
            part = tokens[: found // dtype.itemsize]
            ends += [int(part.min()), int(part.max())] if part.size else []
            ends, done = [min(ends), max(ends)] if ends else [], done + found
    if done != size or not ends:
        raise DataError(f"{path}: has {done} bytes now, {size} a moment ago; wait until its writer has finished")
    return TokenContent(digest.hexdigest(), *ends)


def sequence_lengths(info: IndexedInfo) -> npt.NDArray[np.int32]:
    """Returns the number of tokens of each sequence, an (S,) array mapped from PREFIX.idx."""
    return np.memmap(info.idx_path, dtype="<i4", mode="r", offset=HEADER.size, shape=(info.num_sequences,))


def with_ending(prefix: str | Path, ending: str) -> Path:
    """Returns PREFIX + ending; Path.with_suffix would replace the part after a dot in the prefix."""
    return Path(f"{prefix}{ending}")


def rebuild_hint(prefix: str | Path) -> str:
    """Returns the remedy for damaged files of `prefix`, for messages: a prepare command only if a manifest lists them.

    Raises:
        DataError: the manifest beside them cannot be read.
    """
    folder = Path(prefix).parent
    if _listed(Path(prefix)) is None:
        return "copy it again, or make it again with the tool that wrote it"
    return f"make it again: megatron-lion prepare --input FILE --tokenizer PATH --output {folder} --overwrite"


def check_indexed(prefix: str | Path, rebuild: str | None = None, *, contents: bool = True) -> IndexedInfo:
    """Opens PREFIX.bin and PREFIX.idx and checks everything that does not need the tokens.

    It checks magic, version, dtype, both sizes, every length, pointer and document boundary. If a manifest.json beside
    them lists the pair, it also compares the index's hash and the size of the tokens: files that were swapped between
    datasets or splits are rejected. Megatron-Core itself accepted
    195 of 300 index files with a flipped bit.

    Args:
        prefix: path without ending; an ending .bin or .idx is removed.
        rebuild: command that makes the files again, for messages; None builds one from the prefix.
        contents: whether to read and hash the index; otherwise only the header, the last sequence and the sizes are read,
            because another process of this node checks the rest.

    Raises:
        DataError: a file is missing, damaged or of another dataset; names the file and the command that makes it again.
    """
    text = str(prefix)
    prefix = Path(text[:-4] if text.endswith((".bin", ".idx")) else text)
    again = rebuild or rebuild_hint(prefix)
    bin_path, idx_path = with_ending(prefix, ".bin"), with_ending(prefix, ".idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file; PREFIX.bin and PREFIX.idx are needed; {again}")
    try:
        bin_bytes = bin_path.stat().st_size
        with open(idx_path, "rb", buffering=0) as stream:
            idx_bytes = os.fstat(stream.fileno()).st_size
            header = stream.read(HEADER.size)
            dtype, num_sequences, num_boundaries = _read_header(header, idx_bytes, idx_path, bin_path, again)
            arrays = IndexArrays(stream.fileno(), num_sequences, num_boundaries)
            num_tokens, fault = find_fault(arrays, dtype.itemsize) if contents else (_end(arrays, dtype.itemsize), None)
    except OSError as error:
        raise DataError(f"{error.filename or idx_path}: cannot be read: {error.strerror}") from None
    if fault is not None:
        raise DataError(f"{idx_path}: {fault}: damaged; {again}")
    if num_tokens == 0:
        raise DataError(f"{idx_path}: contains no tokens, only empty sequences ({num_sequences}); {again}")
    # Megatron does not compare the two: from a short .bin, read without mmap, it returns uninitialised memory as tokens.
    needed = num_tokens * dtype.itemsize
    if bin_bytes != needed:
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes, but {idx_path.name} describes {num_tokens} tokens of "
            f"{dtype.itemsize} bytes = {needed}: truncated, or of another dataset; {again}"
        )
    listed = _listed(prefix)
    info = IndexedInfo(prefix, dtype, num_boundaries - 1, num_sequences, num_tokens, bin_bytes, idx_bytes, listed)
    if listed is not None and (
        (listed.documents, listed.tokens, listed.bin_bytes) != (info.num_documents, num_tokens, bin_bytes)
        or (contents and listed.idx_sha256 != _idx_sha256(info))
    ):
        raise DataError(f"{idx_path}: not the file that {MANIFEST_NAME} beside it lists (sha256 differs); {again}")
    return info


def _idx_sha256(info: IndexedInfo) -> str:
    try:
        return info.idx_sha256
    except OSError as error:
        raise DataError(f"{info.idx_path}: cannot be read: {error.strerror}") from None


def _end(arrays: IndexArrays, itemsize: int) -> int:
    """Number of tokens by the last sequence of checked arrays."""
    last = arrays.num_sequences - 1
    return int(arrays.pointers(last, last + 1)[0]) // itemsize + int(arrays.lengths(last, last + 1)[0])


def _listed(prefix: Path) -> SplitInfo | None:
    if not (prefix.parent / MANIFEST_NAME).is_file():
        return None
    splits = read_manifest(prefix.parent).splits.values()
    return next((split for split in splits if split.prefix == prefix.name), None)


def _read_header(
    header: bytes, idx_bytes: int, idx_path: Path, bin_path: Path, again: str
) -> tuple[np.dtype[Any], int, int]:
    """Checks the 34 bytes before the arrays; returns (dtype, number of sequences, number of document boundaries)."""
    if idx_bytes < HEADER.size:
        raise DataError(f"{idx_path}: {idx_bytes} bytes, the header alone has {HEADER.size}: truncated; {again}")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC:
        with open(bin_path, "rb") as stream:
            swapped = stream.read(len(MAGIC)) == MAGIC
        said = f"{bin_path.name} does: the two are swapped" if swapped else "it is not an index of token files"
        raise DataError(f"{idx_path}: does not begin with MMIDIDX; {said}; {again}")
    if version != VERSION:
        raise DataError(f"{idx_path}: index version {version}; version {VERSION} is needed; {again}")
    if code not in READABLE_CODES:
        kinds = ", ".join(f"{number} ({dtype.name})" for number, dtype in sorted(READABLE_CODES.items()))
        raise DataError(f"{idx_path}: dtype code {code}; one of {kinds} is needed; {again}")
    if num_sequences == 0 or num_boundaries < 2:
        raise DataError(f"{idx_path}: holds no documents; {again}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if idx_bytes == expected + num_sequences:
        raise DataError(
            f"{idx_path}: has a mode for each sequence, as Megatron writes for multimodal data; this project reads only text; write the "
            "text without modes"
        )
    if idx_bytes != expected:
        raise DataError(
            f"{idx_path}: {idx_bytes} bytes, but its header ({num_sequences} sequences, "
            f"{num_boundaries - 1} documents) needs {expected}: truncated or damaged; {again}"
        )
    return READABLE_CODES[code], num_sequences, num_boundaries
