"""metrics.jsonl and its sinks: every number arrives, torn lines are removed, a resumed run keeps its identity."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from megatron_lion.config import LogConfig, RunConfig
from megatron_lion.errors import EnvironmentFault, StorageError
from megatron_lion.runs import metrics
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


def test_no_line_follows_one_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file would have a gap that no reader sees; the loop ends the run on all ranks."""
    writer = MetricsWriter(tmp_path, config_with(tmp_path), is_main=True)
    writer.write(1, {"train/loss": 2.5})

    def refuse(path: Path, line: str) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append_line", refuse)
        writer.write(2, {"train/loss": 2.25})
    writer.write(3, {"train/loss": 2.0})
    assert str(writer.failure) == "full"
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1]


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        MetricsWriter(tmp_path, config_with(tmp_path), is_main=True)
    assert not (tmp_path / "elsewhere").exists()


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


def test_tensorboard_is_written_by_default_if_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    assert RunConfig().log.tensorboard is None

    def events_in(name: str, **log: Any) -> list[Path]:
        folder = tmp_path / name
        folder.mkdir()
        writer = MetricsWriter(folder, config_with(folder, **log), is_main=True)
        writer.write(1, {"train/loss": 2.5})
        writer.close()
        assert (folder / "metrics.jsonl").is_file()
        return list(folder.glob("tensorboard/events*"))

    assert events_in("installed")
    assert not events_in("unwanted", tensorboard=False)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "find_spec", lambda name: None)
        assert not events_in("not installed")
    assert not caplog.records
    # Installed, but of a version that cannot be imported: only who asked for it is stopped.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert not events_in("broken")
    assert "TensorBoard is installed but cannot be imported" in caplog.text
    with pytest.raises(EnvironmentFault, match=r"log\.tensorboard: cannot be imported"):
        events_in("asked for", tensorboard=True)


@pytest.mark.parametrize("start", [0, 2])
def test_tensorboard_hides_the_steps_that_a_run_repeats(start: int, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for begin, end, loss in ((0, 5, 1.0), (start, 7, 2.0)):
        writer = MetricsWriter(tmp_path, config_with(tmp_path, tensorboard=True), is_main=True, start=begin)
        for step in range(begin + bool(begin), end):
            writer.write(step, {"train/loss": loss})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, 1.0 if start > 0 and step <= start else 2.0) for step in range(7)]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    """A start must not read a gigabyte; the file here is sparse, so reading it all would take a minute and its memory."""
    config = config_with(tmp_path)
    path = tmp_path / "metrics.jsonl"
    for tail, kept in (
        (b'\n{"step": 2}', b'\n{"step": 2}\n'),
        (b'\n{"step": 2, "a', b"\n"),
        (b'\n{"step": 2}\n', None),
    ):
        with open(path, "wb") as stream:
            stream.seek(1 << 40)
            stream.write(tail)
        MetricsWriter(tmp_path, config, is_main=True)
        with open(path, "rb") as stream:
            stream.seek(1 << 40)
            assert stream.read() == (tail if kept is None else kept)


@pytest.mark.parametrize("size", [10, (1 << 16) - 3, 1 << 16, 200_000])
def test_a_long_last_line_is_kept_or_dropped_whole(size: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, long = '{"step": 1}\n', json.dumps({"step": 2, "note": "x" * size})
    for text, kept in (
        (first + long, first + long + "\n"),
        (first + long[:-1], first),
        (long, long + "\n"),
        (long[:-2], ""),
    ):
        path.write_text(text)
        MetricsWriter(tmp_path, config_with(tmp_path), is_main=True)
        assert path.read_text() == kept


class FakeWandb(types.ModuleType):
    """Records the calls it receives."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.axes: list[tuple[str, str]] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.started.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)

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
    assert wandb.logged == [{"train/loss": 2.0, "optimizer_step": step} for step in (1, 2)]
    assert wandb.axes == [("*", "optimizer_step")] * 2


def test_wandb_gets_the_steps_that_a_run_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own step may only increase: it drops lines of earlier ones, so it must not be given any."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ((1, 2, 3), (3, 4)):
        writer = MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True, start=steps[0] - 1)
        for step in steps:
            writer.write(step, {"train/loss": 1.0})
        writer.close()
    assert [line["optimizer_step"] for line in wandb.logged] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("old", ["", "\n"])
def test_an_empty_wandb_id_is_made_again(old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb_id").write_text(old)
    MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True)
    assert len(wandb.started[0]["id"]) == 12
    assert (tmp_path / "wandb_id").read_text().strip() == wandb.started[0]["id"]


def test_wandb_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        EnvironmentFault, match=r"log.wandb_project: install it with `pip install megatron-lion\[wandb\]`"
    ):
        MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="lion"), is_main=True)


class CommError(Exception):
    """As wandb's own, which is no OSError."""


def broken(calls: dict[str, Exception]) -> FakeWandb:
    """A module whose functions of these names raise these errors."""

    def fail(error: Exception) -> Any:
        def call(*arguments: Any, **settings: Any) -> None:
            raise error

        return call

    wandb = FakeWandb()
    for name, error in calls.items():
        setattr(wandb, name, fail(error))
    return wandb


FAULTS = [CommError("the server\nanswers 503"), BrokenPipeError(32, "Broken pipe"), TimeoutError("timed out")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_lost_wandb_service_does_not_end_a_run(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", broken({"log": fault, "finish": fault}))
    writer = MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True)
    for step in (1, 2):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    assert writer.failure is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [record.message.count("Weights & Biases gets no further metrics") for record in caplog.records] == [1]
    assert "\n" not in caplog.records[0].message


def test_a_wandb_service_that_is_lost_at_the_end_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", broken({"finish": FAULTS[0]}))
    MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True).close()
    assert "CommError: the server answers 503" in caplog.text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_wandb_service_that_does_not_start_is_one_line(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", broken({"init": fault}))
    with pytest.raises(EnvironmentFault, match=r"does not start: .*WANDB_MODE=offline") as caught:
        MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True)
    assert "\n" not in str(caught.value)


def test_a_full_disk_under_wandb_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", broken({"log": OSError(errno.ENOSPC, "No space left on device")}))
    writer = MetricsWriter(tmp_path, config_with(tmp_path, wandb_project="p"), is_main=True)
    writer.write(1, {"train/loss": 1.0})
    assert "make room" in str(writer.failure)
