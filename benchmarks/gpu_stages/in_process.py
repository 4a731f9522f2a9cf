"""The parts of stage `run` that run in its own process, parallel to the runs that it started."""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from probe_cost import passes_alone, timed, whole_probe
from train_step import MODELS

from megatron_lion.config import RunConfig
from megatron_lion.configfile import load_config
from megatron_lion.data.manifest import read_manifest
from megatron_lion.device import Device, select_device
from megatron_lion.gradient.full_gradient import probe_run
from megatron_lion.model.sizes import model_size
from megatron_lion.parallel import Ranks, process_groups

from .children import Child, newest_manifest
from .on_cpu import load_and_save, tiny_numbers
from .runs import built, take_step
from .settings import CONFIGS, check, tiny_config, tiny_settings, words
from .stage import Stage
from .stage_run import evaluate, finished, run_settings, same_as_undisturbed

TOLERANCE = 1e-5
PROBE_SAMPLES, PROBE_BATCHES = 16, 100


@dataclass
class Beside:
    """The processes that run parallel to this one.

    Attributes:
        twin: folder of the undisturbed run.
        undisturbed, cpu: process of the undisturbed run, and the CPU process.
        answer: file that the CPU process writes.
        stopper: thread that stops and resumes another run.
        interrupted: results of that thread.
    """

    twin: Path
    undisturbed: Child
    cpu: Child
    answer: Path
    stopper: threading.Thread
    interrupted: dict[str, Any]


def checks(stage: Stage, beside: Beside, tiny: RunConfig) -> None:
    """Runs all parts in order; the timed part comes last, after the other processes have ended."""
    device, twin, cpu, answer = select_device(stage.device), beside.twin, beside.cpu, beside.answer
    with process_groups(device) as ranks:
        stage.attempt("recompute with dropout", 5, lambda: recompute(stage, device, ranks))
        stage.attempt("tiny model = CPU's", 5, lambda: same_as_cpu(stage, tiny, device, ranks, cpu, answer))
        stage.attempt("200 steps on real text", 3, lambda: finished(stage, twin, beside.undisturbed))
        stage.attempt(
            "checkpoint to the CPU and back", 5, lambda: to_cpu_and_back(stage, twin, device, ranks, cpu, answer)
        )
        stage.attempt("evaluate", 8, lambda: evaluate(stage, twin))
        beside.stopper.join()
        stage.attempt("SIGTERM, 2 workers, resume", 0, lambda: same_as_undisturbed(stage, twin, beside.interrupted))
        stage.attempt("probe of GPT-2 Small", 20, lambda: probe_small(stage, device, ranks))


def recompute(stage: Stage, device: Device, ranks: Ranks) -> None:
    """Recomputed layers draw the same dropout masks: the first loss is equal bit for bit, gradient norms to 1e-6.

    Recomputation changes only the gradient. Later losses follow from it; whether they are equal is recorded.
    """
    found = {}
    for name, on in (("stored", False), ("recomputed", True)):
        settings = run_settings(stage) | {"model.recompute": on, "data.num_workers": 0, "train.steps": 3}
        assert stage.data is not None
        with built(tiny_config(stage.folder / name, stage.data, settings), device, ranks) as (built_run, batches):
            found[name] = [take_step(built_run, batches) for _ in range(3)]
    pairs = list(zip(found["stored"], found["recomputed"], strict=True))
    apart = max(abs(one.grad_l2 / other.grad_l2 - 1) for one, other in pairs)
    same = [one.loss == other.loss for one, other in pairs]
    stage.row(
        "recompute with dropout", passed=same[0] and apart < 1e-6, same_losses=same, largest_norm_difference=apart
    )


def same_as_cpu(stage: Stage, config: RunConfig, device: Device, ranks: Ranks, cpu: Child, answer: Path) -> None:
    ours = tiny_numbers(config, device, ranks)
    theirs = answered(stage, cpu, answer)["tiny"]
    apart = {name: abs(ours[name] / theirs[name] - 1) for name in ours if name != "weights"}
    same = ours["weights"] == theirs["weights"]
    stage.row("tiny model = CPU's", passed=same and max(apart.values()) <= TOLERANCE, same_initial_weights=same,
              largest_relative_difference=max(apart.values()), relative_differences=apart)  # fmt: skip


def to_cpu_and_back(stage: Stage, twin: Path, device: Device, ranks: Ranks, cpu: Child, answer: Path) -> None:
    """A checkpoint of this device, restored and saved by the CPU and restored here, has the same state each time."""
    on_cpu = tuple(answered(stage, cpu, answer)["fingerprints"])
    config = replace(load_config(twin / "config.yaml"), run_dir=str(stage.folder / "back"))
    back = load_and_save(config, stage.folder / "back", device, ranks, found_in=stage.folder / "from-cpu")
    manifest = newest_manifest(twin)
    saved = (manifest["state_fingerprint"], manifest["weights_fingerprint"])
    stage.row(
        "checkpoint to the CPU and back", passed=saved == on_cpu == back, on_cpu=saved == on_cpu, back=saved == back
    )


def answered(stage: Stage, cpu: Child, answer: Path) -> dict[str, Any]:
    if not answer.exists():
        cpu.check(stage.remaining())
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def peak_bytes(device: Device) -> int:
    """Peak memory of this process so far in bytes; the difference of two readings is the extra memory of the code between."""
    return int(torch.cuda.max_memory_allocated()) if device.kind == "cuda" else 0


def training_samples(data: Path, seq_length: int) -> int:
    """Number of samples in a dataset's training split: a probe reads each at most once."""
    return (read_manifest(data).splits["train"].tokens - 1) // seq_length


def probe_small(stage: Stage, device: Device, ranks: Ranks) -> None:
    """Probes 100 batches at GPT-2 Small's initial weights: r / √d, and the time relative to the passes it needs.

    Batches have 16 samples of 1,024 tokens; the paper's have 640 samples. The probe's extra work per batch does not
    depend on the batch size, so the ratio is larger here than at 640.
    """
    assert stage.data is not None
    model = MODELS["gpt2-124m"][0] if not stage.rehearse else "gpt2_tiny.yaml"
    samples = 2 if stage.rehearse else PROBE_SAMPLES
    batches = 4 if stage.rehearse else min(PROBE_BATCHES, training_samples(stage.data, 1024) // samples)
    settings = {
        **(tiny_settings(True) if stage.rehearse else {"train.test_every": 0, "model.vocab_size": 50257, "log.progress": False}),
        "run_dir": stage.folder / "probe", "data.path": f"[{stage.data}]", "device": stage.device, "train.precision": "bf16",
        "train.global_batch_size": samples, "train.micro_batch_size": samples, "train.steps": 1, "schedule.warmup_steps": 0,
        "probe.every": 1, "probe.num_batches": batches, "checkpoint.at_steps": "[]",
    }  # fmt: skip
    config = check(load_config(CONFIGS / model, words(settings)))
    torch.compiler.reset()  # the parts above had another shape: without a reset mcore's fusions are compiled for dynamic shapes
    with built(config, device, ranks) as (built_run, _):
        first = probe_run(built_run)  # compiles the fusions; its result is used, its time is not
        assert first is not None
        if device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        alone, whole, peaks = [timed(passes_alone, built_run)[0]], [], [peak_bytes(device)]
        whole.append(timed(whole_probe, built_run)[0])
        peaks.append(peak_bytes(device))
        while len(whole) < 3 and stage.remaining() > 1.3 * (alone[0] + whole[0]):
            alone.append(timed(passes_alone, built_run)[0])
            whole.append(timed(whole_probe, built_run)[0])
        metrics = first.metrics()
        size = model_size(config.model, built_run.corpora.vocab_size).num_parameters
        added = statistics.median(b - a for a, b in zip(alone, whole, strict=True))
        stage.row(
            "probe of GPT-2 Small", d=size, norm_ratio_over_sqrt_d=metrics["probe/norm_ratio_over_sqrt_d"],
            over_passes=statistics.median(b / a for a, b in zip(alone, whole, strict=True)), repeats=len(whole),
            added_ms_per_batch=1e3 * added / batches, probe_seconds=statistics.median(whole),
            passes_seconds=statistics.median(alone),
            extra_mib=(peaks[1] - peaks[0]) / 2**20 if device.kind == "cuda" else None,
            batches=batches, samples_per_batch=samples, tokens_per_sample=config.model.seq_length,
            grad_l1=metrics["probe/grad_l1"], grad_l2=metrics["probe/grad_l2"], kkt_residual=metrics["probe/kkt_residual"],
            noise_share=metrics["probe/noise_share"], loss=metrics["probe/loss"],
            training_tokens=built_run.corpora.train_tokens, weights="initial",
        )  # fmt: skip
