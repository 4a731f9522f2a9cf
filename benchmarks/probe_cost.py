"""Measures the time of a full-gradient probe relative to the forward and backward passes it needs.

Two things run in turn in one process on the same batches. The first is the passes alone: megatron-core's schedule,
gradients accumulated in DDP's buffers, no reduction or readout. The second is the whole probe: ladder, sketch of
each batch, norms by parameter, reductions, result. The figure is the ratio of their times, which does not depend on
the machine's speed; the ratio of CPU seconds does not depend on other processes either. The probe's extra work per batch
does not depend on the batch size, so the ratio falls with --global-batch-size.

    python benchmarks/probe_cost.py --output benchmarks/results/probe_cost.json
    torchrun --nproc-per-node 2 benchmarks/probe_cost.py …            # with reductions between processes
    python benchmarks/probe_cost.py --size gpt2-small --device cuda   # the relevant case on a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lion.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from megatron_lion.config_checks import check_config
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.device import select_device
from megatron_lion.gradient.full_gradient import probe_run
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.jobs import world_size_from_env
from megatron_lion.parallel import broadcast_object, process_groups
from megatron_lion.train.run import build_run

SIZES = {
    "gpt2-tiny": ({"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128}, 16, 8, "fp32"),
    "gpt2-small": (
        {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024},
        640,
        16,
        "bf16",
    ),
}
VOCAB = 50257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-batches", type=int, default=10)
    parser.add_argument(
        "--global-batch-size",
        type=int,
        default=None,
        help="samples per batch; default by size, 16 or the paper's 640",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device = select_device(args.device)
    with process_groups(device) as ranks:
        folder = Path(broadcast_object(tempfile.mkdtemp(prefix="probe-cost-") if ranks.is_main else None))
        config = make_config(args, folder, ranks)
        check_config(config, world_size_from_env())
        run = build_run(config, device, ranks, for_training=False, for_probing=True)
        result = measure(run, args.repeats)
        if ranks.is_main:
            report = {**facts(device.name(), ranks.world_size, args), **result}
            text = json.dumps(report, indent=2)
            print(text)
            if args.output is not None:
                args.output.write_text(text + "\n")


def make_config(args: argparse.Namespace, folder: Path, ranks: Any) -> RunConfig:
    """Config of a run on random tokens; their values do not change the cost."""
    model, batch, micro, precision = SIZES[args.size]
    batch = args.global_batch_size or batch
    if ranks.is_main:
        random = np.random.default_rng(0)
        with IndexedWriter(folder / "corpus", VOCAB) as writer:
            length = model["seq_length"]
            for _ in range(args.num_batches * batch + 64):
                writer.add_document(random.integers(0, VOCAB, length + 1))
            writer.finalize()
    torch.distributed.barrier()
    return RunConfig(
        run_dir=str(folder / "run"),
        device=args.device,
        model=ModelConfig(**model, vocab_size=VOCAB, hidden_dropout=0.0, attention_dropout=0.0),
        data=DataConfig(path=[str(folder / "corpus")], split="99,0.5,0.5"),
        train=TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro, precision=precision, test_every=0),
        checkpoint=CheckpointConfig(every=0),
        probe=ProbeConfig(num_batches=args.num_batches),
    )


def passes_alone(run: Any) -> None:
    """Runs only the forward and backward passes of a probe's batches."""
    config, chunk = run.config, run.model[0]
    batches = run.probe_batches()
    chunk.zero_grad_buffer()
    chunk.eval()
    settings = chunk.config
    # Without these hooks megatron-core's schedule reduces and scales no gradients.
    settings.finalize_model_grads_func = settings.grad_scale_func = settings.no_sync_func = None
    with chunk.no_sync():
        for _ in range(config.probe.num_batches):
            get_forward_backward_func()(
                forward_step_func=run.forward_step,
                data_iterator=batches,
                model=chunk,
                num_microbatches=config.num_microbatches(run.ranks.world_size),
                seq_length=config.model.seq_length,
                micro_batch_size=config.train.micro_batch_size,
                forward_only=False,
            )
    chunk.train()


def whole_probe(run: Any) -> None:
    result = probe_run(run)
    assert result is not None
    result.metrics()
    result.as_dict()


def timed(call: Any, run: Any) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process) of a call."""
    # Garbage of the last call, ranks that are behind and queued kernels would otherwise count into this call.
    gc.collect()
    torch.distributed.barrier()
    run.device.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call(run)
    run.device.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(run: Any, repeats: int) -> dict[str, Any]:
    """Times both; each of them runs first in half of the rounds."""
    timed(passes_alone, run)
    timed(whole_probe, run)
    pairs = []
    for number in range(repeats):
        order = (passes_alone, whole_probe) if number % 2 == 0 else (whole_probe, passes_alone)
        times = {call.__name__: timed(call, run) for call in order}
        pairs.append((times["passes_alone"], times["whole_probe"]))
    report: dict[str, Any] = {}
    batches = run.config.probe.num_batches
    for index, clock in enumerate(("wall", "cpu")):
        alone, whole = ([item[index] for item in side] for side in zip(*pairs, strict=True))
        ratios = [b / a for a, b in zip(alone, whole, strict=True)]
        report[clock] = {
            "passes_s": statistics.median(alone),
            "probe_s": statistics.median(whole),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "added_ms_per_batch": 1e3 * statistics.median(b - a for a, b in zip(alone, whole, strict=True)) / batches,
        }
    sizes = {
        "num_parameters": sum(p.numel() for p in run.model[0].parameters()),
        "num_batches": batches,
    }
    return {
        "repeats": repeats,
        **sizes,
        "tokens_per_batch": run.config.train.global_batch_size * run.config.model.seq_length,
        "sketch_ms": sketch_ms(run),
        **report,
    }


def sketch_ms(run: Any, repeats: int = 21) -> float:
    """Median time of one sketch of the gradient buffers, which a probe makes once a batch, in ms of wall time."""
    sketch = GradientSketch(run.model)
    return 1e3 * statistics.median(timed(lambda _: sketch.local(), run)[0] for _ in range(repeats))


def facts(device: str, world_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions and settings of the measurement."""
    repo = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=repo, capture_output=True, text=True, check=False
    )
    return {
        "what": "full-gradient probe over the forward-backward passes it needs",
        "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "device": device, "processor": processor(),
        "world_size": world_size, "threads": torch.get_num_threads(), "size": args.size,
        "python": platform.python_version(), "torch": metadata.version("torch"), "megatron_core": metadata.version("megatron-core"),
    }  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
