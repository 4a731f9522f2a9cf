"""Stage `run`: a pretraining run as a user has it: stopped, resumed, taken to a CPU and back, probed, evaluated.

What measures no time runs side by side: an undisturbed run, one that is stopped and resumed, the CPU's side, and this
process. The probe of GPT-2 Small, which is timed, runs when they have ended.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from probe_cost import passes_alone, timed, whole_probe
from train_step import MODELS

from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config, load_config
from megatron_lion.device import Device, select_device
from megatron_lion.gradient.probe import probe_run
from megatron_lion.model.sizes import model_size
from megatron_lion.parallel import Ranks, process_groups

from .children import Child, newest_manifest, wait_for_step
from .on_cpu import load_and_save, tiny_numbers
from .runs import CONFIGS, built, check, take_step, tiny_config, tiny_settings, words
from .stage import Stage, describe

STEPS, SIGNAL_AT = 200, 100
EVALUATED_TOKENS = 30_000
TOLERANCE = 1e-5
PROBE_SAMPLES, PROBE_BATCHES = 16, 100


def run(stage: Stage) -> None:
    if stage.data is None:
        raise RuntimeError("no dataset: give --data")
    wait_for_data(stage, stage.data)
    settings = run_settings(stage)
    twin, cut = stage.folder / "twin", stage.folder / "cut"
    undisturbed = Child(stage, "twin", pretrain_words(twin, settings))
    interrupted: dict[str, Any] = {}
    stopper = threading.Thread(target=stop_and_resume, args=(stage, cut, settings, interrupted))
    stopper.start()
    tiny = parity_config(stage)
    answer = stage.folder / "answer.json"
    (stage.folder / "tiny.yaml").write_text(dump_config(tiny))
    request = {
        "tiny_config": str(stage.folder / "tiny.yaml"),
        "run_dir": str(twin),
        "target": str(stage.folder / "from-cpu"),
    }
    (stage.folder / "request.json").write_text(json.dumps(request))
    cpu = Child(
        stage, "on_cpu", ["-m", "gpu_stages.on_cpu", str(stage.folder / "request.json"), str(answer)], hide_gpu=True
    )
    device = select_device(stage.device)
    with process_groups(device) as ranks:
        stage.attempt("recompute with dropout", 5, lambda: recompute(stage, device, ranks))
        stage.attempt("tiny model = CPU's", 5, lambda: same_as_cpu(stage, tiny, device, ranks, cpu, answer))
        stage.attempt("200 steps on real text", 3, lambda: finished(stage, twin, undisturbed))
        stage.attempt(
            "checkpoint to the CPU and back", 5, lambda: to_cpu_and_back(stage, twin, device, ranks, cpu, answer)
        )
        stage.attempt("evaluate", 8, lambda: evaluate(stage, twin))
        stopper.join()
        stage.attempt("SIGTERM, 2 workers, resume", 0, lambda: same_as_undisturbed(stage, twin, interrupted))
        stage.attempt("probe of GPT-2 Small", 20, lambda: probe_small(stage, device, ranks))
    for child in (undisturbed, cpu):
        child.kill()


def wait_for_data(stage: Stage, data: Path) -> None:
    """The dataset is made beside the first stages."""
    while not data.is_dir():
        if stage.remaining() < 5:
            raise TimeoutError(f"{data.name}: the dataset was not made in time; see data.log")
        time.sleep(0.1)


def run_settings(stage: Stage) -> dict[str, Any]:
    """A run on real text whose end is the same bits whenever it is run."""
    return tiny_settings(stage.rehearse) | {
        "device": stage.device, "data.path": f"[{stage.data}]", "data.num_workers": 2, "train.steps": STEPS,
        "train.precision": "bf16", "train.deterministic": True, "train.log_every": 1 if stage.rehearse else 5,
        "optimizer.master_weights": "split32", "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1,
    }  # fmt: skip


def pretrain_words(run_dir: Path, settings: dict[str, Any]) -> list[str]:
    flags = words({**settings, "run_dir": run_dir})
    return ["-m", "megatron_lion", "pretrain", "--config", str(CONFIGS / "gpt2_tiny.yaml"), *flags]


def stop_and_resume(stage: Stage, run_dir: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Work of a thread: a run, SIGTERM to its whole process group at half its steps, and the same command again."""
    try:
        first = Child(stage, "cut", pretrain_words(run_dir, settings))
        found["signalled"] = wait_for_step(first, run_dir, SIGNAL_AT, stage.remaining())
        first.signal_group(signal.SIGTERM)
        found["code"] = first.wait(stage.remaining())
        found["said"] = first.last_line()
        found["stopped_at"] = newest_manifest(run_dir)["step"]
        second = Child(stage, "resumed", pretrain_words(run_dir, settings))
        second.check(stage.remaining())
        found["manifest"] = newest_manifest(run_dir)
    except Exception as error:
        found["error"] = describe(error)


def finished(stage: Stage, run_dir: Path, child: Child) -> None:
    child.check(stage.remaining())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    stage.row("200 steps on real text", passed=losses[-1] < losses[0], first_loss=losses[0], last_loss=losses[-1])


def same_as_undisturbed(stage: Stage, twin: Path, found: dict[str, Any]) -> None:
    """Exit code 75, a checkpoint of that moment, and the end of the undisturbed run bit for bit."""
    expected = newest_manifest(twin)
    keys = ("step", "state_fingerprint", "weights_fingerprint", "consumed_samples")
    same = "manifest" in found and all(found["manifest"][key] == expected[key] for key in keys)
    stage.row(
        "SIGTERM, 2 workers, resume", passed=bool(found.get("signalled") and found.get("code") == 75 and same),
        exit_code=found.get("code"), stopped_at=found.get("stopped_at"), same_end=same, said=found.get("said"),
        reason=found.get("error"),
    )  # fmt: skip


def parity_config(stage: Stage) -> RunConfig:
    """fp32, no dropout: what differs between two devices is the order of their sums alone."""
    settings = tiny_settings(stage.rehearse) | {
        "device": stage.device, "train.precision": "fp32", "train.steps": 1, "probe.every": 1, "probe.num_batches": 4,
    }  # fmt: skip
    assert stage.data is not None
    return tiny_config(stage.folder / "parity", stage.data, settings)


def same_as_cpu(stage: Stage, config: RunConfig, device: Device, ranks: Ranks, cpu: Child, answer: Path) -> None:
    ours = tiny_numbers(config, device, ranks)
    theirs = answered(stage, cpu, answer)["tiny"]
    apart = {name: abs(ours[name] / theirs[name] - 1) for name in ours if name != "weights"}
    same = ours["weights"] == theirs["weights"]
    stage.row("tiny model = CPU's", passed=same and max(apart.values()) <= TOLERANCE, same_initial_weights=same,
              largest_relative_difference=max(apart.values()), relative_differences=apart)  # fmt: skip


def answered(stage: Stage, cpu: Child, answer: Path) -> dict[str, Any]:
    if not answer.exists():
        cpu.check(stage.remaining())
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def to_cpu_and_back(stage: Stage, twin: Path, device: Device, ranks: Ranks, cpu: Child, answer: Path) -> None:
    """The checkpoint of this device, restored and saved by the CPU, restored here: the same state each time."""
    on_cpu = tuple(answered(stage, cpu, answer)["fingerprints"])
    config = replace(load_config(twin / "config.yaml"), run_dir=str(stage.folder / "back"))
    back = load_and_save(config, stage.folder / "back", device, ranks, found_in=stage.folder / "from-cpu")
    manifest = newest_manifest(twin)
    saved = (manifest["state_fingerprint"], manifest["weights_fingerprint"])
    stage.row(
        "checkpoint to the CPU and back", passed=saved == on_cpu == back, on_cpu=saved == on_cpu, back=saved == back
    )


def recompute(stage: Stage, device: Device, ranks: Ranks) -> None:
    """Recomputed layers draw the same dropout again: three losses equal bit for bit, norms to 1e-6."""
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


def evaluate(stage: Stage, run_dir: Path) -> None:
    """Perplexity of the first 30,000 tokens of the given text, windows without overlap."""
    if stage.text is None:
        stage.row("evaluate", skipped="no text: give --text FILE")
        return
    flags = [
        "--text",
        str(stage.text),
        "--max-tokens",
        str(EVALUATED_TOKENS),
        "--stride",
        "full",
        "--device",
        stage.device,
    ]
    Child(stage, "evaluate", ["-m", "megatron_lion", "evaluate", str(run_dir), *flags]).check(stage.remaining())
    (path,) = (run_dir / "eval").glob("text-*.json")
    result = json.loads(path.read_text())
    stage.row("evaluate", passed=True, text=stage.text.name, text_sha256=result["text_sha256"],
              **{key: result[key] for key in ("n_tok", "max_tokens", "num_targets", "log_token_ppl", "seconds")})  # fmt: skip


def peak_bytes(device: Device) -> int:
    """The largest memory so far; it never falls, so what a second measurement adds is what its code took beyond the first."""
    return int(torch.cuda.max_memory_allocated()) if device.kind == "cuda" else 0


def probe_small(stage: Stage, device: Device, ranks: Ranks) -> None:
    """100 batches at GPT-2 Small's initial weights: r / √d, and the time over the passes that the probe needs.

    Batches are of 16 samples of 1,024 tokens; the paper's are of 640 samples.
    """
    assert stage.data is not None
    model = MODELS["gpt2-124m"][0] if not stage.rehearse else "gpt2_tiny.yaml"
    batches = 4 if stage.rehearse else PROBE_BATCHES
    samples = 2 if stage.rehearse else PROBE_SAMPLES
    settings = {
        **(tiny_settings(True) if stage.rehearse else {"train.test_every": 0, "model.vocab_size": 50257, "log.progress": False}),
        "run_dir": stage.folder / "probe", "data.path": f"[{stage.data}]", "device": stage.device, "train.precision": "bf16",
        "train.global_batch_size": samples, "train.micro_batch_size": samples, "train.steps": 1, "schedule.warmup_steps": 0,
        "probe.every": 1, "probe.num_batches": batches, "checkpoint.at_steps": "[]",
    }  # fmt: skip
    config = check(load_config(CONFIGS / model, words(settings)))
    with built(config, device, ranks) as (built_run, _):
        first = probe_run(built_run)  # compiles, and is the result
        if device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        alone = timed(passes_alone, built_run)[0]
        peaks = [peak_bytes(device)]  # of the passes alone; the probe's own comes second
        whole = timed(whole_probe, built_run)[0]
        peaks.append(peak_bytes(device))
        assert first is not None
        metrics = first.metrics()
        size = model_size(config.model, built_run.corpora.vocab_size).num_parameters
        stage.row(
            "probe of GPT-2 Small", d=size, norm_ratio_over_sqrt_d=metrics["probe/norm_ratio_over_sqrt_d"],
            over_passes=whole / alone,
            extra_bytes_per_parameter=(peaks[1] - peaks[0]) / size if device.kind == "cuda" else None,
            probe_seconds=whole, passes_seconds=alone, batches=batches, samples_per_batch=samples,
            tokens_per_sample=config.model.seq_length, grad_l1=metrics["probe/grad_l1"], grad_l2=metrics["probe/grad_l2"],
            kkt_residual=metrics["probe/kkt_residual"], noise_share=metrics["probe/noise_share"], loss=metrics["probe/loss"],
            training_tokens=built_run.corpora.train_tokens, weights="initial",
        )  # fmt: skip
