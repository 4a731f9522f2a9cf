"""Settings of the small runs that the stages train; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# For comparisons of bits: no tests or probes, no warm-up, and a rate with which many weights are rounding ties.
QUIET = {
    "train.test_every": 0, "probe.every": 0, "checkpoint.every": 0, "checkpoint.at_steps": "[]", "schedule.kind": "constant",
    "schedule.warmup_steps": 0, "optimizer.lr": 2.0**-10, "optimizer.weight_decay": 0.1, "log.progress": False,
}  # fmt: skip
SMALLER = {
    "model.num_layers": 2, "model.hidden_size": 32, "model.num_attention_heads": 4, "model.seq_length": 32,
    "train.global_batch_size": 4, "train.micro_batch_size": 2,
}  # fmt: skip


def tiny_settings(rehearse: bool) -> dict[str, Any]:
    """Overrides of configs/gpt2_tiny.yaml: 4 layers of width 128, or a smaller model in a rehearsal."""
    return {**QUIET, **(SMALLER if rehearse else {})}


def tiny_config(run_dir: Path, data: Path | str, settings: dict[str, Any]) -> RunConfig:
    """The config of configs/gpt2_tiny.yaml with other settings by dotted key, checked like in `pretrain`."""
    return check(
        load_config(CONFIGS / "gpt2_tiny.yaml", words({**settings, "run_dir": run_dir, "data.path": f"[{data}]"}))
    )


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line flags."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def check(config: RunConfig) -> RunConfig:
    check_config(config, 1)
    return config
