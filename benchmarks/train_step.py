"""Measures tokens/s and MFU of the whole training loop, and the optimizer's share of a step.

    python benchmarks/train_step.py                                     # GPT-2 124M and 355M on a GPU; tiny on a CPU
    torchrun --nproc-per-node 8 benchmarks/train_step.py --output benchmarks/results/train_step_8gpu
    python benchmarks/train_step.py --models bert-base,bert-small
    python benchmarks/train_step.py --tiny                              # about a minute on two cores

Each row is the shipped config of a model with one optimizer, built by `build_run` and run by `train_step`, like
`pretrain`, but nothing is logged, probed or saved. On one process two more rows train the same GPT-2 on the same batches
by a plain PyTorch loop and by transformers (plain_loops.py). `--profile 3` adds a table of the time by group of operations
(matrix products, attention, loss, element-wise, gradient buffers, optimizer, copies). The data are random tokens unless
--data names a dataset.

`section` is the work between the reduced gradient and the gathered parameters: norm, clipping, update, bf16 write-out
and, unless it overlaps with the next forward pass, the gather. Times are medians over the steps after warm-up, on the
slowest rank. MFU is relative to the dense bf16 peak of the data sheet, with 6 N + 12 L H S FLOPs per token.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_stages.breakdown import profile_steps
from measuring import heading, shown, surroundings, write_results
from plain_loops import LOOPS, is_possible, loop_step

from megatron_lion.compare.table import markdown_grid
from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import load_config
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.device import Device, select_device
from megatron_lion.errors import MegatronLionError
from megatron_lion.jobs import world_size_from_env
from megatron_lion.model.sizes import VOCAB_SIZES, flops_per_token, model_size
from megatron_lion.parallel import Ranks, broadcast_object, process_groups
from megatron_lion.train.run import Run, build_run
from megatron_lion.train.schedule import lr_at
from megatron_lion.train.step import TrainStep, train_step

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Config, and samples per micro-batch on an 80 GB GPU (tiny models: on a CPU); a step has MICROBATCHES micro-batches.
MODELS = {
    "gpt2-124m": ("gpt2_small.yaml", 16),
    "gpt2-355m": ("gpt2_medium.yaml", 8),
    "bert-small": ("bert_small.yaml", 64),
    "bert-base": ("bert_base.yaml", 32),
    "gpt2-tiny": ("gpt2_tiny.yaml", 4),
    "bert-tiny": ("bert_tiny.yaml", 8),
}
MICROBATCHES = {"cuda": 5, "cpu": 2}
OPTIMIZERS = {
    "lion split32": {"name": "lion", "master_weights": "split32"},
    "lion split32, bf16 momentum": {"name": "lion", "master_weights": "split32", "momentum_dtype": "bf16"},
    "lion split24, int8 momentum": {"name": "lion", "master_weights": "split24", "momentum_dtype": "int8"},
    "lion fp32 shards + copy": {"name": "lion", "master_weights": "shards"},
    "adamw fp32 shards + copy": {"name": "adamw"},
    "sgd fp32 shards + copy": {"name": "sgd"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="the tiny models; always used on a CPU")
    parser.add_argument("--models", "--model", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--optimizers", help=f"separated by semicolons, of {'; '.join([*OPTIMIZERS, *LOOPS])}")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--micro-batch-size", type=int, help="samples per micro-batch; default by model")
    parser.add_argument("--num-microbatches", type=int, help="micro-batches per step; default 5 on CUDA, 2 on a CPU")
    parser.add_argument("--dropout", type=float, help="dropout of every row; default: that of the shipped config")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="profile so many further steps by group"
    )
    parser.add_argument("--data", help="a dataset folder of `megatron-lion prepare`; default random tokens")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    models = "gpt2-124m,gpt2-355m" if on_cuda and not args.tiny else "gpt2-tiny"
    args.models = (args.models or models).split(",")
    args.optimizers = [name.strip() for name in (args.optimizers or ";".join([*OPTIMIZERS, *LOOPS])).split(";")]
    args.num_microbatches = args.num_microbatches or MICROBATCHES["cuda" if on_cuda else "cpu"]
    for option, given, known in (
        ("models", args.models, MODELS),
        ("optimizers", args.optimizers, [*OPTIMIZERS, *LOOPS]),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option}: {', '.join(unknown)}: expected some of {', '.join(known)}")
    return args


def random_data(folder: Path, kind: str, seq_length: int, vocab_size: int | None = None) -> str:
    """Writes a corpus of random tokens; their values do not change the time, and samples may repeat.

    Args:
        folder: dataset or prefix to write.
        kind: "gpt2" or "bert".
        seq_length: tokens per sample.
        vocab_size: number of ids; by default the usual one of the kind.
    """
    ids = vocab_size or VOCAB_SIZES[kind]
    if kind == "bert":
        from megatron_lion.prepare.options import PrepareOptions
        from megatron_lion.prepare.pipeline import prepare

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "##s"]
        words = [f"w{number}" for number in range(ids - len(special))]
        folder.mkdir(parents=True)
        (folder / "vocab.txt").write_text("\n".join(special + words) + "\n")
        dice = random.Random(0)
        sentence = [" ".join(dice.choices(words, k=20)).capitalize() + "." for _ in range(400)]
        texts = (" ".join(dice.choices(sentence, k=seq_length // 5)) for _ in range(200))
        prepare(
            PrepareOptions(
                tokenizer=folder / "vocab.txt",
                output=folder / "data",
                split="98,1,1",
                task="bert",
                workers=1,
                encoder="tokenizers",
            ),
            texts,
        )
        return str(folder / "data")
    dice = np.random.default_rng(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder, ids) as writer:
        for _ in range(200):
            writer.add_document(dice.integers(0, ids, 4 * seq_length))
        writer.finalize()
    return str(folder)


def configure(
    args: argparse.Namespace,
    model: str,
    optimizer: str,
    data: str,
    folder: Path,
    device: Device,
    changes: dict[str, Any] | None = None,
) -> RunConfig:
    """Builds the shipped config of the model with this optimizer, limited to the steps that are timed.

    Args:
        args: micro_batch_size (None: that of the model), num_microbatches, warmup, steps, data (None: random tokens).
        model, optimizer: keys of MODELS and OPTIMIZERS.
        data: dataset folder or prefix.
        folder: parent of the run folder.
        device: device of the run.
        changes: other settings by dotted key.
    """
    file, samples = MODELS[model]
    micro_batch = args.micro_batch_size or samples
    steps = args.warmup + args.steps + getattr(args, "profile", 0)
    settings: dict[str, Any] = {
        "run_dir": folder / f"{model} {optimizer}", "device": device.kind, "data.path": f"[{data}]", "train.steps": steps,
        "train.micro_batch_size": micro_batch, "train.precision": "bf16", "train.test_every": 0, "train.stop_after": "null",
        "train.global_batch_size": micro_batch * args.num_microbatches * world_size_from_env(),
        "probe.every": 0, "checkpoint.every": 0, "checkpoint.at_steps": "[]", "schedule.warmup_steps": 0,
        **{f"optimizer.{key}": value for key, value in OPTIMIZERS.get(optimizer, {"name": "adamw"}).items()},
    }  # fmt: skip
    if getattr(args, "dropout", None) is not None:
        settings |= {"model.hidden_dropout": args.dropout, "model.attention_dropout": args.dropout}
    if not args.data and MODELS[model][0].startswith("gpt2"):
        settings |= {"model.vocab_size": VOCAB_SIZES["gpt2"], "data.split": "98,1,1"}
    settings |= changes or {}
    overrides = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    config = load_config(CONFIGS / file, overrides)
    check_config(config, world_size_from_env())
    return config


def measure(
    config: RunConfig, device: Device, ranks: Ranks, warmup: int, optimizer: str, profiled: int = 0
) -> dict[str, Any]:
    """Builds a run, or a loop of LOOPS beside it, and times it; see `time_run`.

    The last `profiled` steps of a run are profiled instead: `groups_ms` has milliseconds a step by group of operations.
    """
    run = build_run(config, device, ranks)
    batches = run.train_batches()
    take = loop_step(optimizer, run) if optimizer in LOOPS else None
    row = time_run(run, batches, warmup, config.train.steps - profiled, take)
    if profiled and take is None:
        row["groups_ms"] = profile_steps(run, lambda: take_step(run, batches), profiled)["ms"]
    return row


def time_run(
    run: Run,
    batches: Iterator[Any],
    warmup: int,
    steps: int,
    take: Callable[[Iterator[Any]], bool] | None = None,
) -> dict[str, Any]:
    """Times every step and its optimizer section; returns a row with the medians of the slowest rank.

    Args:
        run: a built run before its first step.
        batches: micro-batches: `run.train_batches()`, or others of the same shape.
        warmup: steps that are not counted.
        steps: number of steps, warm-up included.
        take: function that takes a step and returns whether it was skipped; default: `take_step`.

    Raises:
        RuntimeError: a gradient is not finite, so a step was skipped.
    """
    config, device, ranks = run.config, run.device, run.ranks
    sections = time_sections(run)
    walls = []
    for _ in range(steps):
        # Queued kernels and ranks that are behind would otherwise count into this step.
        device.synchronize()
        torch.distributed.barrier()
        started = time.perf_counter()
        skipped = take_step(run, batches).skipped if take is None else take(batches)
        device.synchronize()
        walls.append(time.perf_counter() - started)
        if skipped:
            raise RuntimeError(f"step {run.step}: a gradient is not finite; not timed")
    times = [statistics.median(walls[warmup:]), statistics.median(seconds() for seconds in sections[warmup:])]
    # The collectives of a step make all ranks wait for the slowest, so its medians are those of the job.
    slowest = torch.tensor(times, dtype=torch.float64, device=device.torch_device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    step_s, section_s = slowest.tolist()
    tokens_per_s = config.train.global_batch_size * config.model.seq_length / step_s
    flops = tokens_per_s * flops_per_token(config.model, run.corpora.vocab_size) / ranks.world_size
    peak = device.peak_flops("bf16")
    return {
        "parameters": model_size(config.model, run.corpora.vocab_size).num_parameters, "processes": ranks.world_size,
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "micro_batch_size": config.train.micro_batch_size, "step_ms": step_s * 1e3, "section_ms": section_s * 1e3,
        "share": section_s / step_s, "tokens_per_s": tokens_per_s, "tflops_per_process": flops / 1e12,
        "mfu": flops / peak if peak else None, "max_memory_gib": device.max_memory_gib() if device.kind == "cuda" else None,
    }  # fmt: skip


def take_step(run: Run, batches: Iterator[Any]) -> TrainStep:
    """Takes one optimizer step and advances the run's counters like the training loop."""
    result = train_step(
        run.model, run.optimizer, batches, run.objective, run.config, run.ranks, lr_at(run.config, run.step + 1)
    )
    run.step += 1
    run.consumed_samples += run.config.train.global_batch_size
    return result


def time_sections(run: Run) -> list[Any]:
    """Wraps both halves of the optimizer's step with a timer; returns a list that gets one function for each step.

    Each function returns the seconds of its step, without the read of the losses between the halves. On CUDA they are
    between events: the time does not include the wait for the backward pass, and the timer adds no host synchronisation.
    """
    halves: list[Any] = []
    sections: list[Any] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def half(*args: Any, **options: Any) -> Any:
            if run.device.kind == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                result = call(*args, **options)
                last.record()
                halves.append(lambda: first.elapsed_time(last) / 1e3)
            else:
                started = time.perf_counter()
                result = call(*args, **options)
                seconds = time.perf_counter() - started
                halves.append(lambda: seconds)
            if len(halves) == 2:
                both = tuple(halves)
                sections.append(lambda: sum(part() for part in both))
                halves.clear()
            return result

        return half

    run.optimizer.start_step = timed(run.optimizer.start_step)
    run.optimizer.end_step = timed(run.optimizer.end_step)
    return sections


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as Markdown, ratios first, one block for each model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        lines += [
            f"\n### {model}: {first['parameters']:,} parameters, {first['processes']} process{'es' * (first['processes'] > 1)}, "
            f"{first['tokens_per_step']:,} tokens a step in micro-batches of {first['micro_batch_size']} a process\n",
        ]
        head = ["section / first", "step / first", "optimizer", "section's share", "section ms", "step ms", "tokens/s", "MFU",
                "TFLOP/s a process", "memory GiB"]  # fmt: skip
        body = [
            [
                f"{row['section_ms'] / first['section_ms']:.2f}", f"{row['step_ms'] / first['step_ms']:.3f}", row["optimizer"],
                f"{row['share']:.1%}", f"{row['section_ms']:.2f}", f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:,.0f}",
                shown(row["mfu"], ".1%"), f"{row['tflops_per_process']:.3g}", shown(row["max_memory_gib"], ".1f"),
            ]
            for row in mine
        ]  # fmt: skip
        lines.append(markdown_grid(head, body, "rrl" + "r" * 7))
        if profiled := [row for row in mine if "groups_ms" in row]:
            groups = list(profiled[0]["groups_ms"])
            body = [[row["optimizer"], *(f"{row['groups_ms'][name]:.1f}" for name in groups)] for row in profiled]
            lines += ["", "Milliseconds a step by group of operations, under the profiler:", ""]
            lines.append(markdown_grid(["optimizer", *groups], body, "l" + "r" * len(groups)))
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    device = select_device(args.device)
    facts = surroundings(device.kind)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with process_groups(device) as ranks:
        folder = Path(broadcast_object(tempfile.mkdtemp(prefix="train-step-") if ranks.is_main else None))
        try:
            for model in args.models:
                kind, length = ("bert", 512) if model.startswith("bert") else ("gpt2", 1024)
                data = args.data
                if data is None:
                    made = random_data(folder / model, kind, length) if ranks.is_main else None
                    data = broadcast_object(made)
                for optimizer in args.optimizers:
                    if optimizer in LOOPS and not is_possible(model, ranks.world_size):
                        continue
                    if device.kind == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    try:
                        config = configure(args, model, optimizer, data, folder, device)
                        row = measure(config, device, ranks, args.warmup, optimizer, args.profile)
                        rows.append({"model": model, "optimizer": optimizer, **row})
                    except (RuntimeError, MegatronLionError) as error:  # out of memory is a RuntimeError
                        if (
                            ranks.world_size > 1
                        ):  # the other ranks wait in a collective, so this one cannot go to the next row
                            raise
                        failed.append(f"{model}, {optimizer}: {type(error).__name__}: {str(error).splitlines()[0]}")
                        sys.stderr.write(f"not measured: {failed[-1]}\n")
                    if ranks.is_main:  # after every row, so that a later error or time limit loses none
                        write_results(args.output, "One training step", text(facts, args, rows, failed),
                                      {**facts, "steps": args.steps, "failed": failed, "rows": rows})  # fmt: skip
                    gc.collect()
                    if device.kind == "cuda":
                        torch.cuda.empty_cache()
        finally:
            torch.distributed.barrier()
            if ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_main:
        sys.stdout.write(text(facts, args, rows, failed))


def text(facts: dict[str, Any], args: argparse.Namespace, rows: list[dict[str, Any]], failed: list[str]) -> str:
    """Heading and table, as Markdown."""
    small = "A CPU: the tiny models, to see that it runs; no figure here is about a GPU.\n"
    lines = [f"{heading(facts)}; medians of {args.steps} steps after {args.warmup}.\n"]
    lines += [] if torch.cuda.is_available() and args.device != "cpu" else [f" {small}"]
    lines += [f"\nNot measured: {'; '.join(failed)}.\n"] if failed else []
    return "".join(lines) + table(rows)


if __name__ == "__main__":
    main()
