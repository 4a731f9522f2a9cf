"""The progress line: its fields at several widths of the terminal, and the plain line without a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from rich.progress import Progress

from megatron_lion.train import console as console_file
from megatron_lion.train.console import ProgressFields, TrainProgress, _Line

STEP = {"train/loss": 3.21449, "optim/lr": 6e-5, "optim/skipped_steps": 0, "perf/tokens_per_s": 123456.7}
MEASURED = {"valid/loss": 3.30111, "test/loss": 3.4, "probe/norm_ratio_over_sqrt_d": 0.41234, "probe/grad_l2": 2.0}
EVERY_FIELD = ("loss 3.2145", "3 skipped", "valid 3.3011", "r/sqrt d 0.4123", "lr 6.00e-05", "123,457 tok/s")
"""From the field that matters most to the one that is left out first."""


def drawn(width: int, fields: ProgressFields, encoding: str = "utf-8", label: str = "lion") -> str:
    """Returns the line that a terminal of that width shows at step 1200 of 50000."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with Progress(_Line(fields, terminal), console=terminal, auto_refresh=False) as progress:
        progress.add_task(label, total=50000, completed=1200)
    file.seek(0)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read()).replace("\r", "\n").split("\n")
    shown = [line.rstrip() for line in lines if line.strip()]
    assert len(set(shown)) == 1, "one line, not wrapped"
    return shown[0]


def all_fields() -> ProgressFields:
    fields = ProgressFields()
    fields.update({**STEP, "optim/skipped_steps": 3})
    fields.update(MEASURED)
    return fields


@pytest.mark.parametrize(("width", "count"), [(60, 2), (80, 3), (100, 5), (120, 5), (300, 5)])
def test_a_narrow_terminal_shows_the_fields_that_matter_most(width: int, count: int) -> None:
    line = drawn(width, all_fields())
    assert len(line) <= min(width, 100)
    assert line.startswith("lion   1200/50000  ")
    assert [field for field in EVERY_FIELD if field in line] == list(EVERY_FIELD[:count])


def test_usual_run_on_eighty_columns_shows_loss_validation_and_ratio() -> None:
    fields = ProgressFields()
    fields.update(STEP)
    assert "valid" not in drawn(80, fields)
    assert "skipped" not in drawn(80, fields)
    fields.update(MEASURED)
    line = drawn(80, fields)
    assert all(word in line for word in ("loss 3.2145", "valid 3.3011", "r/sqrt d 0.4123"))
    fields.update({**STEP, "train/loss": 3.1})
    assert "loss 3.1000  valid 3.3011" in drawn(80, fields), "a measurement stays until the next one"
    note = drawn(80, fields, label="lion (probing the full gradient, batch 100 of 100)")
    assert note.startswith("lion (probing the full gradient, batch 100 of 100)   1200/50000")


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    assert drawn(90, ProgressFields(loss=3.0), "ascii").isascii()
    assert "─" in drawn(90, ProgressFields(loss=3.0))


def test_a_step_without_a_loss_shows_none() -> None:
    fields = ProgressFields()
    fields.update({**STEP, "train/loss": None})
    assert not fields.text(200).startswith("loss")


def test_without_a_terminal_a_plain_line_every_fifteen_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(console_file.time, "monotonic", lambda: now[0])
    progress = TrainProgress(tiny.tiny_config(tmp_path, "none", train__steps=40), start=0, shown=True)

    def lines_of(step: int, seconds: float, **more: Any) -> list[str]:
        now[0] += seconds
        progress.update(step, {**STEP, **more})
        return capsys.readouterr().err.splitlines()

    with progress:
        (first,) = lines_of(1, 1)
        assert re.fullmatch(
            r"lion: step 1/40  loss 3\.2145  lr 6\.00e-05  123,457 tok/s  done about \d{4}-\d\d-\d\d \d\d:\d\d", first
        )
        progress.measured(MEASURED)
        assert lines_of(2, 1) == []
        (later,) = lines_of(20, 20, **{"optim/skipped_steps": 3})
        assert "valid 3.3011" in later
        assert "3 skipped" in later
        assert len(later) <= 100
        assert lines_of(40, 100) == [], "the last line waits for what is measured after the last step"
        progress.measured({"valid/loss": 2.5})
        progress.measured({"probe/norm_ratio_over_sqrt_d": 0.5})
    (end,) = capsys.readouterr().err.splitlines()
    assert end.startswith("lion: step 40/40  ")
    assert "valid 2.5000  r/sqrt d 0.5000" in end
    assert "done about" not in end


def test_a_run_shows_what_it_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The training loop hands held-out losses and probes to the progress line; the numbers are those of metrics.jsonl."""
    from megatron_lion.config import LogConfig
    from megatron_lion.device import select_device
    from megatron_lion.train.loop import pretrain

    select_device("cpu")
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = tiny.tiny_config(
        tmp_path / "run",
        corpus,
        train__steps=2,
        train__test_every=1,
        probe__every=1,
        probe__num_batches=2,
        log=LogConfig(),
    )
    pretrain(config)
    end = capfd.readouterr().err.splitlines()[-1]
    found: dict[str, Any] = {}
    for line in tiny.read_metrics(tmp_path / "run"):
        found |= {key: value for key, value in line.items() if value is not None}
    assert end.startswith("lion: step 2/2  ")
    for word in (
        f"loss {found['train/loss']:.4f}", f"valid {found['valid/loss']:.4f}", f"lr {found['optim/lr']:.2e}",
        f"r/sqrt d {found['probe/norm_ratio_over_sqrt_d']:.4f}",
    ):  # fmt: skip
        assert word in end
