"""Writes run folders as `pretrain` and `evaluate` do, with synthetic numbers of realistic shape."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

RATES = {"lion": (1e-3, 4.2, 1.0), "adamw": (3e-3, 4.3, 0.9), "sgd": (0.3, 6.4, 0.25)}


def write_run(
    folder: Path,
    *,
    optimizer: str = "lion",
    model: str = "gpt2-small",
    d: int = 124_475_904,
    steps: int = 1000,
    seed: int = 1234,
    lr: float | None = None,
    offset: float = 0.0,
    tokenizer: str = "t" * 64,
    text: str = "e" * 64,
    kind: str = "wikitext103",
    eval_steps: tuple[int, ...] = (200, 400, 600, 800, 1000),
    probes: bool = True,
) -> Path:
    """Writes one run: a falling loss with noise from its seed, probes below sqrt(d), evaluations of five checkpoints."""
    rng = random.Random(f"{optimizer}{seed}")
    rate, floor, speed = RATES[optimizer]
    config = {
        "run_dir": str(folder), "name": model, "seed": seed,
        "model": {"kind": "gpt2", "seq_length": 1024},
        "optimizer": {"name": optimizer, "lr": lr or rate, "weight_decay": 0.01, "betas": None},
        "train": {"steps": steps, "global_batch_size": 16},
    }  # fmt: skip

    def loss(step: int) -> float:
        return floor + offset + (10.8 - floor) * math.exp(-speed * step / (0.15 * steps))

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(
        json.dumps({"format": 1, "name": model, "model": "gpt2", "optimizer": optimizer, "num_parameters": d,
                    "tokenizer_sha256": tokenizer, "world_size": 2})
    )  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"python": "3.12", "device": "cpu", "cpu_count": 2}))
    lines: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 10):
        time = 1e9 + step * 0.5
        if step:
            lines.append({"step": step, "time": time, "train/loss": loss(step) + rng.gauss(0, 0.05),
                          "optim/lr": rate, "perf/tokens_per_s": 30_000 + rng.gauss(0, 300), "perf/mfu": None,
                          "memory/max_gib": 1.5, "progress/consumed_tokens": step * 16 * 1024})  # fmt: skip
        if step % 100 == 0:
            lines.append({"step": step, "time": time, "test/loss": loss(step) + rng.gauss(0, 0.01),
                          "valid/loss": loss(step)})  # fmt: skip
        if probes and step % 200 == 0:
            ratio = math.sqrt(d) * (0.62 + 0.1 * rng.random())
            lines.append({"step": step, "time": time, "probe/grad_l1": ratio * 2 / (1 + step),
                          "probe/grad_l2": 2 / (1 + step), "probe/norm_ratio": ratio,
                          "probe/norm_ratio_over_sqrt_d": ratio / math.sqrt(d),
                          "probe/kkt_residual": ratio * 2 / (1 + step), "probe/num_batches": 100,
                          "probe/num_parameters": d})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval").mkdir()
    for step in eval_steps:
        value = loss(step) + 0.4 + rng.gauss(0, 0.01)
        (folder / "eval" / f"{kind}-step_{step:07d}.json").write_text(
            json.dumps({"format": 1, "kind": kind, "step": step, "text_path": "wiki.test.tokens", "text_sha256": text,
                        "text_version": "WikiText-103 tokens test", "stride": 32, "seq_length": 1024, "n_orig": 245566,
                        "n_tok": 270330, "loss": value, "token_ppl": math.exp(value), "log_token_ppl": value,
                        "adjusted_ppl": math.exp(value * 1.1008449901248143),
                        "log_adjusted_ppl": value * 1.1008449901248143, "tokenizer_sha256": tokenizer,
                        "precision": "fp32", "max_tokens": None, "seconds": 60.0})
        )  # fmt: skip
    return folder
