"""Tiny corpora, configs and runs: two layers, a second of training, the same code paths as large models."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lion.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron_lion.data.indexed_writer import IndexedWriter

VOCAB = 120


def write_corpus(prefix: Path, *, seed: int = 0, documents: int = 160, vocab_size: int = VOCAB) -> str:
    """Writes random documents of 10-60 tokens; ids have frequencies 1/rank, so that there is something to learn."""
    random = np.random.default_rng(seed)
    chances = 1.0 / np.arange(1, vocab_size + 1)
    with IndexedWriter(prefix, vocab_size) as writer:
        for length in random.integers(10, 60, documents):
            writer.add_document(random.choice(vocab_size, length, p=chances / chances.sum()))
        writer.finalize()
    return str(prefix)


def cuda_settings() -> dict[str, Any]:
    """Settings of every run on CUDA: tests compare runs bit for bit, but CUDA's default backward passes add atomically."""
    return {"train__deterministic": True}


def tiny_config(run_dir: Path | str, corpus: str, **changes: Any) -> RunConfig:
    """Returns a config of a small run; `changes` are dotted keys with `__` for the dot (`optimizer__lr=1e-3`)."""
    if changes.get("device") == "cuda":
        changes = {**cuda_settings(), **changes}
    config = RunConfig(
        run_dir=str(run_dir),
        device="cpu",
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=VOCAB,
            make_vocab_size_divisible_by=64, hidden_dropout=0.0, attention_dropout=0.0,
        ),
        data=DataConfig(path=[corpus], split="80,10,10"),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(steps=5, global_batch_size=8, micro_batch_size=1, precision="fp32", test_every=0,
            test_batches=2, log_every=1),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(progress=False, tensorboard=False),
    )  # fmt: skip
    for key, value in changes.items():
        *sections, name = key.split("__")
        if sections:
            section = dataclasses.replace(getattr(config, sections[0]), **{name: value})
            config = dataclasses.replace(config, **{sections[0]: section})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def train(config: RunConfig) -> dict[str, Any]:
    """Runs `pretrain` (in every process of the job) and returns its `outcome`."""
    from megatron_lion.train.loop import pretrain

    with contextlib.redirect_stderr(io.StringIO()):
        pretrain(config)
    gc.collect()  # ends the run's gloo threads with its model; each wakes a hundred times a second
    return outcome(config.run_dir)


def outcome(run_dir: Path | str) -> dict[str, Any]:
    """Returns per-step losses and gradient norms of a run, its probes and the manifest of its newest checkpoint."""
    lines = read_metrics(run_dir)
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    checkpoints = sorted(Path(run_dir, "checkpoints").glob("step_*/manifest.json"))
    return {
        "losses": [steps[step]["train/loss"] for step in sorted(steps)],
        "norms": [steps[step]["optim/grad_l2"] for step in sorted(steps)],
        "probes": [line for line in lines if "probe/grad_l1" in line],
        "manifest": json.loads(checkpoints[-1].read_text()) if checkpoints else None,
    }


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def opened_run(config: RunConfig) -> Iterator[Any]:
    """Yields a built run inside its process groups, without the training loop."""
    from megatron_lion.determinism import deterministic
    from megatron_lion.device import select_device
    from megatron_lion.parallel import process_groups
    from megatron_lion.train.run import build_run

    layout = {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
    }
    device = select_device(config.device)
    with deterministic(config.train.deterministic), process_groups(device, **layout) as ranks:
        yield build_run(config, device, ranks)


CHECKPOINTED = {"train__steps": 4, "checkpoint__every": 2, "checkpoint__layout": "dp_reshardable"}
"""Settings of a run with checkpoints at steps 2 and 4."""


def write_manifest(folder: Path, step: int, **changes: Any) -> Path:
    """Writes the manifest of a checkpoint of weights alone, with a digest that fits; returns the folder."""
    content = {
        "format": 1, "step": step, "files": {}, "data_digest": None, "tokenizer_sha256": None, "weights_fingerprint": "0" * 32,
        "layout": {"world_size": 1, "dp_size": 1, "tp_size": 1, "pp_size": 1},
        "model": {
            "kind": "gpt2", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 128,
            "seq_length": 16, "gelu": "tanh", "layernorm_epsilon": 1e-5, "vocab_size": VOCAB,
        }, **changes,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))
    return folder


def newest_checkpoint(run_dir: Path | str) -> Any:
    """Opens the newest checkpoint of a run; there must be one."""
    from megatron_lion.runs.steps import find_latest

    found = find_latest(Path(run_dir))
    assert found is not None
    return found


def step_once(run: Any, batches: Any) -> Any:
    """Takes one optimizer step of an opened run."""
    from megatron_lion.train.schedule import lr_at
    from megatron_lion.train.step import train_step

    result = train_step(
        run.model, run.optimizer, batches, run.objective, run.config, run.ranks, lr_at(run.config, run.step + 1)
    )
    run.step += 1
    run.consumed_samples += run.config.train.global_batch_size
    return result


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Returns (class name, message) of the MegatronLionError that a call raises, or ("", "") if it raises none."""
    from megatron_lion.errors import MegatronLionError

    try:
        call(*args, **kwargs)
    except MegatronLionError as error:
        return type(error).__name__, str(error)
    except BaseException:
        return "traceback", traceback.format_exc()
    return "", ""


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"parallel__tensor_model_parallel_size": 2}),
    "PP2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
    "TP2xDP2": (4, {"parallel__tensor_model_parallel_size": 2}),
    "TP2xPP2": (4, {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}),
}
"""Number of processes and settings of each layout."""


def train_each(rank: int, configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Work of one process: runs all configs in turn; a failed run gives its traceback instead of its outcome."""
    results: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        try:
            results[name] = train(config)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    return results


def errors_of_each(rank: int, configs: dict[str, RunConfig]) -> dict[str, tuple[str, str]]:
    """Work of one process: the error of each run."""
    return {name: error_of(train, config) for name, config in configs.items()}


def run_all(
    jobs: dict[str, tuple[int, RunConfig]], work: Callable[..., Any] = train_each, device: str = "cpu"
) -> dict[str, Any]:
    """Runs jobs of (processes, config), grouped by size; returns the first rank's results by name."""
    from distributed import run_distributed

    results: dict[str, Any] = {}
    for size in sorted({size for size, _ in jobs.values()}):
        configs = {name: config for name, (count, config) in jobs.items() if count == size}
        results.update(run_distributed(work, size, configs, device=device)[0])
    return results


def same_bits(one: Any, other: Any) -> bool:
    """Whether two tensors are equal in every bit, including NaNs and the signs of zeros."""
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def read_weights(run_dir: Path | str, step: int, prefix: str = "model.") -> dict[str, Any]:
    """Returns whole tensors of a checkpoint by name (weights begin with "model."), read with torch's own reader."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = Path(run_dir, "checkpoints", f"step_{step:07d}")
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in stored.items()
        if name.startswith(prefix)
    }
    load(weights, storage_reader=FileSystemReader(folder), no_dist=True)
    return weights
