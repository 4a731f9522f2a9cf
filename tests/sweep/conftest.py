"""A corpus for sweeps, and fake runs for tests of the bookkeeping."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_corpus, write_manifest

from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config, load_config
from megatron_lion.jobs import Jobs
from megatron_lion.sweep.grid import with_setting


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data") / "c_text_document")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs that write their folder at once and end with the exit code of `codes` for their name.

    The losses of a run are its learning rate, or the value of `losses` for its name.
    """
    found: dict[str, Any] = {"codes": {}, "losses": {}, "ran": []}
    read: dict[str, RunConfig] = {}

    def run(self: Jobs, verb: str, words: list[str], processes: int = 1, stdout: Any = None) -> int:
        base = Path(words[1]).read_text()
        if base not in read:  # parsing takes a tenth of a second
            read[base] = load_config(words[1])
        config = read[base]
        for key, value in zip(words[2::2], words[3::2], strict=True):
            config = with_setting(config, key.removeprefix("--"), yaml.safe_load(value))
        folder = Path(config.run_dir)
        found["ran"].append(folder.name)
        found["config"] = config
        code = int(found["codes"].get(folder.name, 0))
        if folder.name == found.get("interrupted"):
            signal.raise_signal(signal.SIGINT)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
        steps = config.train.steps if code == 0 else 1
        lines: list[dict[str, float]] = [{"step": steps, "train/loss": 1.0, "progress/consumed_tokens": steps}]
        if code == 0:
            loss = found["losses"].get(folder.name, config.optimizer.lr)
            lines.append({"step": steps, "valid/loss": loss, "test/loss": loss})
            write_manifest(folder / "checkpoints" / f"step_{steps:07d}", steps)
        if code == 6:
            lines.append({"step": 3, "optim/skipped_steps": 3})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return code

    monkeypatch.setattr(Jobs, "run", run)
    return found
