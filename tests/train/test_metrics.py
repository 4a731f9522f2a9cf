"""metrics.jsonl and its sinks: every number arrives, torn lines are removed, a resumed run keeps its identity."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from megatron_lion.config import LogConfig, RunConfig
from megatron_lion.errors import EnvironmentFault
from megatron_lion.runs.metrics import MetricsWriter


def config_with(tmp_path: Path, **log: Any) -> RunConfig:
    return dataclasses.replace(tiny_config(tmp_path, "no-corpus"), log=LogConfig(progress=False, **log))


def test_lines_are_json_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, config_with(tmp_path), is_main=True)
    writer.write(1, {"train/loss": 2.5, "train/grad_norm": float("nan"), "note": "text"})
    with writer.path.open("a") as stream:
        stream.write('{"step": 2, "train')
    again = MetricsWriter(tmp_path, config_with(tmp_path), is_main=True)
    again.write(2, {"train/loss": 2.25})
    lines = [json.loads(line) for line in writer.path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 2.5), (2, 2.25)]
    assert lines[0]["train/grad_norm"] is None
    assert lines[0]["note"] == "text"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, config_with(tmp_path, tensorboard=True, wandb_project="p"), is_main=False)
    writer.write(1, {"train/loss": 2.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, config_with(tmp_path, tensorboard=True), is_main=True)
    for step in (1, 2):
        writer.write(step, {"train/loss": 1.0 / step, "note": "text"})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


class FakeWandb(types.ModuleType):
    """Records the calls it receives."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.started.append(settings)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        pass


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        writer = MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="lion"), is_main=True)
        writer.write(step, {"train/loss": 2.0, "note": "text"})
        writer.close()
    assert [settings["project"] for settings in wandb.started] == ["lion", "lion"]
    assert wandb.started[0]["id"] == wandb.started[1]["id"] != ""
    assert wandb.started[0]["config"]["optimizer"]["name"] == "lion"
    assert wandb.logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 2.0})]


def test_wandb_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        EnvironmentFault, match=r"log.wandb_project: install it with `pip install megatron-lion\[wandb\]`"
    ):
        MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="lion"), is_main=True)
