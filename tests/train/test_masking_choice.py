"""`data.masking`: auto is settled once for a run, and a run of an earlier version keeps Megatron's masks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from distributed import run_distributed
from tiny_bert import tiny_bert, write_bert_corpus

from megatron_lion.config import RunConfig
from megatron_lion.errors import CheckpointError
from megatron_lion.runs.checkpoint_manifest import manifest_bytes
from megatron_lion.runs.folder import check_settings, read_config

STEPS = 4


def config_of(folder: Path, corpus: str, name: str, masking: Any = "auto", stop_after: int | None = None) -> RunConfig:
    return tiny_bert(
        folder / name,
        corpus,
        data__masking=masking,
        train__steps=STEPS,
        train__stop_after=stop_after,
        checkpoint__every=2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masking")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return write_bert_corpus(folder / "text")


@pytest.fixture(scope="module")
def runs(folder: Path, corpus: str) -> dict[str, dict[str, Any]]:
    """Whole runs with each kind of masks, and two that stopped after half; the one of an earlier version stores no kind."""
    jobs = {
        "auto": config_of(folder, corpus, "auto"),
        "megatron": config_of(folder, corpus, "megatron", "megatron"),
        "half": config_of(folder, corpus, "half", stop_after=2),
        "earlier": config_of(folder, corpus, "earlier", "megatron", stop_after=2),
    }
    found = run_distributed(tiny.train_each, 1, jobs)[0]
    as_of_an_earlier_version(folder / "earlier")
    return found


def as_of_an_earlier_version(run: Path) -> None:
    """Removes the setting from a run's config.yaml and from the manifests of its checkpoints."""
    saved = run / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    del content["data"]["masking"]
    saved.write_text(yaml.safe_dump(content))
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["sha256"], manifest["settings"]["data.masking"]
        path.write_bytes(manifest_bytes(manifest))


def stored(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["masking"]


def test_a_new_run_stores_its_choice(runs: dict[str, Any], folder: Path) -> None:
    assert [stored(folder / name) for name in ("auto", "megatron", "half")] == ["vectorized", "megatron", "vectorized"]
    assert runs["auto"]["manifest"]["settings"]["data.masking"] == "vectorized"
    assert runs["auto"]["losses"] != runs["megatron"]["losses"]
    assert len(runs["auto"]["losses"]) == len(runs["megatron"]["losses"]) == STEPS


def test_a_resumed_run_keeps_its_masks(runs: dict[str, Any], folder: Path, corpus: str) -> None:
    for name in ("half", "earlier"):
        shutil.copytree(folder / name, folder / f"{name} resumed")
    jobs = {name: config_of(folder, corpus, f"{name} resumed") for name in ("half", "earlier")}
    found = run_distributed(tiny.train_each, 1, jobs)[0]
    for name, kind, whole in (("half", "vectorized", "auto"), ("earlier", "megatron", "megatron")):
        assert found[name]["losses"] == runs[whole]["losses"], name
        assert found[name]["manifest"]["state_fingerprint"] == runs[whole]["manifest"]["state_fingerprint"]
        assert stored(folder / f"{name} resumed") == kind


@pytest.mark.parametrize(("name", "has"), [("half", "vectorized"), ("earlier", "megatron")])
def test_other_masks_are_refused_when_a_run_resumes(
    runs: dict[str, Any], folder: Path, corpus: str, name: str, has: str
) -> None:
    other = {"vectorized": "megatron", "megatron": "vectorized"}[has]
    with pytest.raises(CheckpointError, match=f"other settings .data.masking: {has}, now {other}.; use them"):
        check_settings(config_of(folder, corpus, name, other))
    for masking in ("auto", has):
        check_settings(config_of(folder, corpus, name, masking))
    assert read_config(folder / name).data.masking == has


def test_probes_of_an_earlier_versions_checkpoint_have_its_masks(
    runs: dict[str, Any], folder: Path, corpus: str
) -> None:
    """Commands that open a run read its settings through `read_config`."""
    config = read_config(folder / "earlier")
    assert config.data.masking == "megatron"
    fresh = dataclasses.replace(config, data=dataclasses.replace(config.data, masking="vectorized"))
    assert run_distributed(first_positions, 1, [config, fresh])[0] == [True, False]


def first_positions(rank: int, configs: list[RunConfig]) -> list[bool]:
    """Whether the masks of the first training samples are Megatron's, for each config."""
    found = []
    for config in configs:
        with tiny.opened_run(config) as run:
            samples = [run.datasets[0][number] for number in range(8)]
            plain = [super(type(run.datasets[0]), run.datasets[0]).__getitem__(number) for number in range(8)]
            places = [sample["positions"][sample["loss_mask"] > 0].tolist() for sample in samples]
            found.append(places == [sample["loss_mask"].nonzero()[0].tolist() for sample in plain])
    return found
