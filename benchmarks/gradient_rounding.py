"""What bf16 gradient buffers lose against fp32 ones: the error of the summed gradient, and its flipped signs.

One rank sums micro-batches of a small GPT-2 in bf16 at its initial weights, on random tokens, into buffers
of both kinds: `train.accumulate_allreduce_grads_in_fp32` true and false. Each micro-batch's own gradient has the same
bits in both, so the difference is the rounding of the running sum alone, without that of a reduction over ranks.

    python benchmarks/gradient_rounding.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import heading, surroundings
from train_step import random_data

from megatron_lion.compare.table import markdown_grid
from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config
from megatron_lion.determinism import deterministic
from megatron_lion.device import Device, select_device
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.train.run import build_run

COUNTS = (1, 4, 16, 64)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SETTINGS = {
    "model.seq_length": 128, "model.hidden_dropout": 0.0, "model.attention_dropout": 0.0, "train.precision": "bf16",
    "train.micro_batch_size": 1, "train.test_every": 0, "train.steps": 1, "schedule.warmup_steps": 0, "probe.every": 0,
    "checkpoint.every": 0, "checkpoint.at_steps": "[]", "data.split": "98,1,1", "log.progress": False,
}  # fmt: skip


def settings(data: str, folder: Path, device: str, counts: tuple[int, ...], changes: dict[str, Any]) -> RunConfig:
    """The config of configs/gpt2_tiny.yaml with a batch of as many micro-batches as the largest count."""
    given = {**SETTINGS, **changes, "train.global_batch_size": counts[-1], "device": device, "run_dir": folder}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return load_config(CONFIGS / "gpt2_tiny.yaml", [*words, "--data.path", f"[{data}]"])


def sums(config: RunConfig, device: Device, ranks: Ranks, counts: tuple[int, ...]) -> list[torch.Tensor]:
    """The whole buffer after each number of micro-batches, in float64."""
    with deterministic(config.train.deterministic):
        run = build_run(config, device, ranks)
        (chunk,) = run.model
        chunk.zero_grad_buffer()
        batches, found = run.train_batches(), []
        for number in range(1, counts[-1] + 1):
            output, loss_of = run.forward_step(batches, chunk)
            loss_of(output)[0].backward()
            if number in counts:
                found.append(torch.cat([buffer.grad_data.double() for buffer in chunk.buffers]))
    return found


def measure(device: Device, ranks: Ranks, folder: Path, counts: tuple[int, ...], changes: dict[str, Any]) -> list[Any]:
    """Returns (micro-batches, relative l2 error, share of flipped signs) for each count."""
    data = random_data(folder / "tokens", "gpt2", int(changes.get("model.seq_length", 128)), vocab_size=2000)
    found = []
    for kept in (True, False):
        own = {**changes, "model.vocab_size": 2000, "train.accumulate_allreduce_grads_in_fp32": kept}
        own["train.gradient_accumulation_fusion"] = False
        found.append(sums(settings(data, folder / str(kept), device.kind, counts, own), device, ranks, counts))
    rows = []
    for count, exact, rounded in zip(counts, *found, strict=True):
        used = exact != 0  # the padding of the buffer, and tokens that no sample has
        flipped = (exact.sign() != rounded.sign())[used].double().mean()
        rows.append((count, float((rounded - exact).norm() / exact.norm()), float(flipped)))
    return rows


def table(rows: list[Any]) -> str:
    body = [[str(count), f"{error:.2%}", f"{flips:.3%}"] for count, error, flips in rows]
    return markdown_grid(["micro-batches", "relative ℓ2 error", "flipped signs"], body, "rrr") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    device = select_device(args.device)
    with process_groups(device) as ranks, tempfile.TemporaryDirectory() as folder:
        rows = measure(device, ranks, Path(folder), COUNTS, {})
    sys.stdout.write(f"{heading(surroundings(device.kind))}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
