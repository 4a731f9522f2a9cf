"""The benchmark of bf16 gradient buffers, at tiny sizes, against sums that round in the same way here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from distributed import run_distributed

COUNTS = (1, 3, 6)
SMALL = {"model.num_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2, "model.seq_length": 32}


def measured(rank: int, folder: Path) -> list[Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import gradient_rounding

    from megatron_lion.device import select_device
    from megatron_lion.parallel import process_groups

    device = select_device("cpu")
    with process_groups(device) as ranks:
        return gradient_rounding.measure(device, ranks, folder, COUNTS, SMALL)


def test_the_first_gradient_is_exact_and_each_addition_rounds(tmp_path: Path) -> None:
    (rows,) = run_distributed(measured, 1, tmp_path)
    assert [count for count, _, _ in rows] == list(COUNTS)
    errors, flips = [error for _, error, _ in rows], [share for _, _, share in rows]
    assert (errors[0], flips[0]) == (0.0, 0.0)
    # Two additions, each off by at most half of 2^-7 of a sum; sums of this size do not grow by more than the additions.
    assert 2.0**-12 < errors[1] < 2.0**-7
    assert errors[1] < errors[2] < 2.0**-5
    assert 0 < flips[2] < 0.02
