"""Missing memory is one line that names what to make smaller, and code 9; other exceptions keep their traceback."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_lion.cli import main
from megatron_lion.commands import generate

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.02 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError(CUDA)


def on_the_host() -> None:
    torch.empty(1 << 52, dtype=torch.uint8)


def in_numpy() -> None:
    np.empty(1 << 52, dtype=np.uint8)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (on_a_gpu, "the device is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB;"),
        (on_the_host, "this machine is out of memory: tried to allocate 4503599627370496 bytes;"),
        (in_numpy, "this machine is out of memory: Unable to allocate 4.00 PiB"),
    ],
)
def test_missing_memory_is_one_line(
    fault: Callable[[], None], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "run", lambda arguments: fault())
    assert main(["generate", "run"]) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-lion: {named}")
    assert line.endswith("use a smaller --max-new-tokens or --count")


def test_another_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(arguments: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(generate, "run", fault)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["generate", "run"])
