"""Measures the time and memory of saving, verifying and restoring a checkpoint, by part and beside plain writers.

    python benchmarks/checkpoint_time.py --output benchmarks/results/checkpoint_time_cpu
    torchrun --nproc-per-node 4 benchmarks/checkpoint_time.py
    python benchmarks/checkpoint_time.py --quick                      # a tiny model, to see that it runs

A case is a layout of the saved state and a form of the master weights. `save` and `restore` are what `pretrain` does; a
save blocks training. The other parts are inside of them. `torch.save` and `safetensors` write the same tensors (fp32
master weights and momentum of each process, and on the first one the bf16 weights) to one file a process, with fsync,
and hash, compare and commit nothing.

Times are medians over the repeats, on the slowest rank. The least of them is what other work on the machine disturbed
least. The first one includes what is done once a process, and memory that is touched for the first time. Memory is the
most that any rank held above what it held before, of host memory. Files are read from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import heading, shown, surroundings, write_results
from train_step import CONFIGS, random_data, take_step

from megatron_lion.compare.table import markdown_grid
from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config
from megatron_lion.device import Device, select_device
from megatron_lion.jobs import world_size_from_env
from megatron_lion.optim.parameter_shards import local_shards
from megatron_lion.parallel import Ranks, broadcast_object, process_groups
from megatron_lion.runs.steps import Checkpoint
from megatron_lion.train.checkpoint import verify_checkpoint
from megatron_lion.train.fingerprint import state_fingerprint, weights_fingerprint
from megatron_lion.train.model_state import model_sharded_state
from megatron_lion.train.restore import restore_run
from megatron_lion.train.run import Run, build_run, save_run

LAYOUTS = ("fully_reshardable", "dp_reshardable")
MASTERS = ("split32", "shards")
# Layers, width and vocabulary: 30.5 and 0.1 million parameters.
SIZES = {"30m": (9, 512, 4000), "quick": (2, 64, 500)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--layers", type=int, help="another number of layers than the default model's")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--masters", default=",".join(MASTERS), help=f"of {', '.join(MASTERS)}")
    parser.add_argument("--repeats", type=int, default=5, help="times that each part is done after the first")
    parser.add_argument("--folder", help="where to write the checkpoints; default the system's temporary folder")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    return parser.parse_args()


def configure(args: argparse.Namespace, layout: str, master: str, data: str, folder: Path, device: Device) -> RunConfig:
    layers, hidden, vocab = SIZES["quick" if args.quick else "30m"]
    settings = {
        "run_dir": folder / f"{layout}-{master}", "device": device.kind, "data.path": f"[{data}]", "data.split": "100,0,0",
        "model.num_layers": args.layers or layers, "model.hidden_size": hidden, "model.num_attention_heads": hidden // 64,
        "model.vocab_size": vocab, "train.steps": 1, "train.micro_batch_size": 1, "train.precision": "bf16",
        "train.global_batch_size": world_size_from_env(), "train.test_every": 0, "probe.every": 0, "checkpoint.every": 0,
        "checkpoint.at_steps": "[]", "checkpoint.layout": layout, "optimizer.master_weights": master,
        "schedule.warmup_steps": 0,
    }  # fmt: skip
    return load_config(
        CONFIGS / "gpt2_tiny.yaml", [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    )


class Memory:
    """The most resident memory of a block beyond what was resident before, in bytes; None if the system does not count it."""

    def __enter__(self) -> Memory:
        self.most: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present value
            self.before = self._peak()
        except OSError:
            self.before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.most = self._peak() - self.before

    @staticmethod
    def _peak() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


def largest(values: list[float], device: Device) -> list[float]:
    """Returns each value of the rank where it is largest; a collective call."""
    box = torch.tensor(values, dtype=torch.float64, device=device.torch_device)
    torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
    return box.tolist()


def time_part(
    work: Callable[[int], Any], repeats: int, device: Device, after: Callable[[Any], None] = lambda _: None
) -> dict[str, Any]:
    """Times `work`, called with the number of the repeat, and calls `after` with its result, untimed."""
    walls, peaks = [], []
    for number in range(repeats + 1):
        device.synchronize()
        torch.distributed.barrier()
        with Memory() as memory:
            started = time.perf_counter()
            result = work(number)
            device.synchronize()
            walls.append(time.perf_counter() - started)
        peaks.append(memory.most)
        torch.distributed.barrier()
        after(result)
    walls = largest(walls, device)
    return {
        "ms": 1e3 * statistics.median(walls[1:]),
        "least_ms": 1e3 * min(walls[1:]),
        "first_ms": 1e3 * walls[0],
        "memory_mb": None if None in peaks else largest([max(peaks)], device)[0] / 1e6,
    }


def own_tensors(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that this rank accounts for, as contiguous tensors on the host."""
    found = {}
    for shard in local_shards(run.model, run.optimizer):
        for key, flat in {"param": shard.main, **shard.state}.items():
            found[f"{shard.name}:{key}"] = flat.detach().cpu().clone()
    if run.ranks.dp_rank == 0:
        for name, parameter in run.model[0].named_parameters():
            found[name] = parameter.detach().cpu().clone()
    return found


def synced(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def plain_writers(run: Run, folder: Path) -> dict[str, Callable[[int], Any]]:
    """Functions that write or read this rank's tensors with another library."""
    from safetensors.torch import load_file, save_file

    tensors = own_tensors(run)
    pickled, plain = folder / f"{run.ranks.rank}.pt", folder / f"{run.ranks.rank}.safetensors"

    def save_pickled(_: int) -> None:
        torch.save(tensors, pickled)
        synced(pickled)

    def save_plain(_: int) -> None:
        save_file(tensors, plain)
        synced(plain)

    return {
        "torch.save, fsync": save_pickled,
        "torch.load": lambda _: torch.load(pickled, weights_only=True),
        "safetensors save_file, fsync": save_plain,
        "safetensors load_file": lambda _: {
            key: value.clone() for key, value in load_file(plain).items()
        },  # it maps the file
    }


def measure(run: Run, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each part."""
    device, rows = run.device, []
    layout = run.config.checkpoint.layout
    saved: list[Checkpoint] = []

    def save(number: int) -> Checkpoint:
        run.step = number + 1
        return save_run(run)

    def keep_newest(checkpoint: Checkpoint) -> None:
        if saved and run.ranks.is_main:
            shutil.rmtree(saved[-1].folder)
        saved.append(checkpoint)
        torch.distributed.barrier()

    def sharded(_: int) -> Any:
        return run.optimizer.sharded_state(model_sharded_state(run.model, ""), is_loading=False, layout=layout)

    rows.append({"part": "save", **time_part(save, repeats, device, keep_newest)})
    files = saved[-1].manifest["files"]
    of_rank = [entry["bytes"] for name, entry in files.items() if name.startswith("__")]
    parts: dict[str, Callable[[int], Any]] = {
        "— state fingerprint": lambda _: state_fingerprint(run.model, run.optimizer),
        "— weights fingerprint": lambda _: weights_fingerprint(run.model),
        "— state as sharded tensors": sharded,
        "restore": lambda _: restore_run(run, saved[-1]),
        "— verify": lambda _: verify_checkpoint(saved[-1], run.ranks),
        **plain_writers(run, folder),
    }
    rows += [{"part": part, **time_part(work, repeats, device)} for part, work in parts.items()]
    whole = sum(entry["bytes"] for entry in files.values())
    return [{**row, "bytes": whole, "largest_file": max(of_rank)} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as Markdown, one block for each case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        first = mine[0]
        processes = f"{first['processes']} process{'es' * (first['processes'] > 1)}"
        lines.append(
            f"\n### {case}: {first['parameters']:,} parameters, {processes}, {first['bytes'] / 1e6:,.1f} MB, largest file "
            f"{first['largest_file'] / 1e6:,.1f} MB\n"
        )
        plain = next((row["ms"] for row in mine if row["part"].startswith("torch.save")), None)
        body = [
            [
                shown(row["ms"] / plain if plain else None, ".2f"), row["part"], f"{row['ms']:,.1f}",
                f"{row['least_ms']:,.1f}", f"{row['first_ms']:,.1f}",
                f"{row['bytes'] / row['ms'] / 1e3:,.0f}", shown(row["memory_mb"], ",.0f"),
            ]
            for row in mine
        ]  # fmt: skip
        lines.append(
            markdown_grid(
                ["time / torch.save", "part", "ms", "least ms", "first ms", "MB/s of the whole", "memory MB"],
                body,
                "rlrrrrr",
            )
        )
    return "\n".join(lines) + "\n"


def text(facts: dict[str, Any], args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    return f"{heading(facts)}; medians of {args.repeats} repeats after the first.\n{table(rows)}"


def measure_cases(
    args: argparse.Namespace, device: Device, ranks: Ranks, folder: Path, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measures every case; the results are written after each, so that a later error loses none."""
    rows: list[dict[str, Any]] = []
    vocab = SIZES["quick" if args.quick else "30m"][2]
    data = broadcast_object(random_data(folder / "data", "gpt2", 128, vocab) if ranks.is_main else None)
    for master in args.masters.split(","):
        for layout in args.layouts.split(","):
            run = build_run(configure(args, layout, master, data, folder, device), device, ranks)
            run.run_id = "0" * 32
            take_step(run, run.train_batches())  # a momentum that is not all zeros
            fixed = {
                "case": f"{layout}, master weights {master}", "layout": layout, "master_weights": master,
                "parameters": sum(parameter.numel() for parameter in run.model[0].parameters()), "processes": ranks.world_size,
            }  # fmt: skip
            rows += [{**fixed, **row} for row in measure(run, args.repeats, folder)]
            if ranks.is_main:
                write_results(
                    args.output,
                    "Saving and restoring a checkpoint",
                    text(facts, args, rows),
                    {**facts, "repeats": args.repeats, "rows": rows},
                )
                sys.stdout.write(table([row for row in rows if row["case"] == fixed["case"]]))
                sys.stdout.flush()
    return rows


def main() -> None:
    args = arguments()
    device = select_device(args.device)
    facts = surroundings(device.kind)
    with process_groups(device) as ranks:
        made = tempfile.mkdtemp(prefix="checkpoint-time-", dir=args.folder) if ranks.is_main else None
        folder = Path(broadcast_object(made))
        try:
            measure_cases(args, device, ranks, folder, facts)
        finally:
            torch.distributed.barrier()
            if ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
