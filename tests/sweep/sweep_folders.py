"""The config of tiny sweeps, and the content of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_config

from megatron_lion.configfile import dump_config
from megatron_lion.sweep.sweep_file import Sweep, read_sweep


def config_file(folder: Path, corpus: str, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    settings = {"train__test_every": 2, "train__test_batches": 1, "train__steps": 4, **changes}
    path.write_text(dump_config(tiny_config("unused", corpus, **settings)))
    return path


def need_sweep(folder: Path) -> Sweep:
    sweep = read_sweep(folder)
    assert sweep is not None
    return sweep


def statuses(folder: Path) -> dict[str, str]:
    return {entry.name: entry.status for entry in need_sweep(folder).runs}
