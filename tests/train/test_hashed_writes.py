"""A checkpoint's bytes are hashed while they are written, large ones in another thread."""

from __future__ import annotations

import hashlib
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_lion.train import checkpoint_tensors

LARGE = checkpoint_tensors._LARGE
SIZES = (3, LARGE, 5, LARGE - 1, 2 * LARGE, LARGE + 7, 0, 1)


class Slow:
    """SHA-256 that begins late, so that a caller who does not wait for it would change the bytes before."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def update(self, content: Any) -> None:
        time.sleep(0.02)
        self.digest.update(content)


class NoThreads(ThreadPoolExecutor):
    def submit(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, NoThreads, None])
def test_the_digest_is_of_the_bytes_in_their_order(kind: type[ThreadPoolExecutor] | None) -> None:
    contents = [os.urandom(size) for size in SIZES]
    digest, raw = Slow(), io.BytesIO()
    helper = None if kind is None else kind(1)
    stream = checkpoint_tensors._HashedStream(raw, digest, helper)
    for content in contents:
        memory = bytearray(content)
        assert stream.write(memoryview(memory)) == len(content)
        memory[:] = bytes(len(memory))  # as the caller's memory, which is freed or used again
    if helper is not None:
        helper.shutdown()
    assert raw.getvalue() == b"".join(contents)
    assert digest.digest.hexdigest() == hashlib.sha256(b"".join(contents)).hexdigest()


def test_a_write_that_fails_waits_for_the_digest_too() -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    digest = Slow()
    content = os.urandom(LARGE)
    with ThreadPoolExecutor(1) as helper:
        stream = checkpoint_tensors._HashedStream(Full(), digest, helper)
        with pytest.raises(OSError, match="No space"):
            stream.write(content)
        assert digest.digest.hexdigest() == hashlib.sha256(content).hexdigest()
