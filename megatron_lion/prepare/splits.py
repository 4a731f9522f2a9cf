"""Assigns documents to train, validation and test by a hash of their text.

The split of a document does not depend on the other documents, the files or the number of workers, and equal texts get
the same split. So a test document stays a test document when the corpus grows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megatron_lion.data.manifest import SPLITS
from megatron_lion.errors import ConfigError

AUTO = "auto"
"""Value of --split that takes the shares of `auto_split`."""

LARGE_SPLIT = (99.9, 0.05, 0.05)
"""Shares of a large corpus; also the default of earlier versions at every size."""

SAMPLES = 64
"""Fewest samples of a valid or test split whose loss is not mostly noise."""

_END = 1 << 64
_LONG, _SHORT = 1024, 128  # sequence lengths of GPT-2, and of a model for a laptop (configs/gpt2_tiny.yaml)
_BYTES_PER_TOKEN = 6  # more than any usual vocabulary has, so that the share is large enough
_MOST_SHARE = 15.0
_STEPS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def parse_split(text: str | Sequence[float]) -> tuple[float, float, float]:
    """Returns the shares of train, valid and test in percent, from one to three relative weights.

    >>> parse_split("969,30,1"), parse_split("1")
    ((96.9, 3.0, 0.1), (100.0, 0.0, 0.0))

    Raises:
        ConfigError: the weights are not one to three finite numbers ≥ 0, or all are 0.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        weights = [float(part) for part in parts]
    except (TypeError, ValueError):
        weights = []
    total = sum(weights)
    if not 1 <= len(weights) <= 3 or not all(weight >= 0 for weight in weights) or not 0 < total < float("inf"):
        raise ConfigError(f"split {text!r}: one to three weights ≥ 0 are needed, for train,valid,test: 99.9,0.05,0.05")
    train, valid, test = (round(100 * weight / total, 9) for weight in (*weights, 0.0, 0.0)[:3])
    return train, valid, test


def auto_split(text_bytes: int) -> tuple[float, float, float]:
    """Returns the shares of train, valid and test in percent for a corpus of this size.

    Valid and test get about 64 samples of 1,024 tokens each, but at most 5 %; of a text below 1 MB, 64 samples of 128
    tokens, but at most 10 %. The shares are rounded up to few values, so that a growing corpus rarely changes them.

    Args:
        text_bytes: size of the text in bytes of UTF-8.

    >>> auto_split(500_000), auto_split(9_000_000), auto_split(40_000_000_000)
    ((80.0, 10.0, 10.0), (90.0, 5.0, 5.0), (99.9, 0.05, 0.05))
    """
    size = max(text_bytes, 1)
    wanted = max(
        min(100 * SAMPLES * _LONG * _BYTES_PER_TOKEN / size, 5.0),
        min(100 * SAMPLES * _SHORT * _BYTES_PER_TOKEN / size, 10.0),
    )
    share = next(step for step in _STEPS if step >= wanted)
    return round(100 - 2 * share, 9), share, share


def small_split_warning(tokens: Mapping[str, int]) -> str | None:
    """Returns a warning if valid or test has too few tokens for a loss that is not mostly noise, or None.

    Args:
        tokens: number of tokens of each split that exists, by name.
    """
    total = sum(tokens.values())
    length = _LONG if total >= 40 * SAMPLES * _LONG else _SHORT
    small = {name: count for name, count in tokens.items() if name != SPLITS[0] and count < SAMPLES * length}
    if not small:
        return None
    share = math.ceil(20 * 1.2 * 100 * SAMPLES * length / total) / 20  # a fifth more, since documents differ in length
    found = " and ".join(f"{count:,} tokens in the {name} split" for name, count in small.items())
    enough = f"--split {100 - 2 * share:g},{share:g},{share:g}" if share <= _MOST_SHARE else "more text"
    return (
        f"{found}: fewer than {SAMPLES} samples of {length:,} tokens ({SAMPLES * length:,} tokens), so the loss measured on them is "
        f"mostly noise; {enough} gives enough"
    )


def document_hash(utf8: bytes, seed: int) -> int:
    """Returns the 64-bit hash that determines a document's split: the first 8 bytes of SHA-256 over seed and text."""
    digest = DocumentDigest(seed)
    digest.update(utf8)
    return digest.value()


class DocumentDigest:
    """`document_hash` of a text that arrives in parts."""

    def __init__(self, seed: int) -> None:
        """Starts with no text."""
        self._digest = hashlib.sha256(b"%d\0" % seed)

    def update(self, utf8: bytes) -> None:
        """Adds the next UTF-8 bytes of the text."""
        self._digest.update(utf8)

    def value(self) -> int:
        """Returns the 64-bit hash of the text so far."""
        return int.from_bytes(self._digest.digest()[:8], "little")

    def first_bytes(self) -> bytes:
        """Returns the 16 bytes of a 128-bit hash of the text so far; the first 8 are `value`, little-endian."""
        return self._digest.digest()[:16]


def assign_splits(hashes: npt.NDArray[np.uint64], split: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """Returns the split of each document: 0 train, 1 valid, 2 test.

    The range of the 64-bit hash is divided in proportion to the shares. If a split with a share above zero gets no
    document, it takes one with its duplicates from the split with the most distinct texts, if that split keeps at least
    one. It takes the document whose hash is nearest to its part of the range. So three distinct texts fill three splits.

    Args:
        hashes: (D,) uint64, from `document_hash`.
        split: shares in percent.

    Returns:
        (D,) uint8. A split can still be empty if there are fewer distinct texts than splits.
    """
    bounds = _bounds(split)
    members = splits_by_range(hashes, split)
    for index in range(3):
        if split[index] == 0 or np.any(members == index):
            continue
        texts, places = np.unique(hashes, return_index=True)  # equal texts have equal hashes, and stay together
        donor = int(np.bincount(members[places], minlength=3).argmax())
        candidates = texts[members[places] == donor]
        if candidates.size < 2:
            continue
        low, high = (np.uint64(min(bound, _END - 1)) for bound in (bounds[index], bounds[index + 1]))
        # uint64 has no negative numbers: each difference is taken on the side where it is not below 0.
        distance = np.where(candidates < low, low - candidates, candidates - np.minimum(candidates, high))
        members[hashes == candidates[distance.argmin()]] = index
    return members


def splits_by_range(hashes: npt.NDArray[np.uint64], split: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """Returns the split of each document by its hash alone, (D,) uint8: `assign_splits` if it leaves no split empty."""
    bounds = _bounds(split)
    members = np.zeros(hashes.size, dtype=np.uint8)
    for index in (1, 2):
        if split[index] > 0 and bounds[index] < _END:
            members[hashes >= np.uint64(bounds[index])] = index
    return members


def _bounds(split: tuple[float, float, float]) -> list[int]:
    bounds = [0, round(split[0] / 100 * _END), round((split[0] + split[1]) / 100 * _END), _END]
    return [min(bound, _END) for bound in bounds]  # rounded shares can sum to a little more than 100


def split_names(split: tuple[float, float, float]) -> list[str]:
    """Returns the names of the splits with a share above zero."""
    return [name for name, share in zip(SPLITS, split, strict=True) if share > 0]
