"""MegatronBert folders as other tools write them: `import` reproduces the model, or rejects the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lion.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "##s"]
EMBEDDING, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random MegatronBert with large weights."""
    from transformers import MegatronBertConfig, MegatronBertForPreTraining

    folder = tmp_path_factory.mktemp("bert") / "hf"
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = MegatronBertForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def changed(base: Path, folder: Path, change: Callable[[Tensors], Any], **settings: Any) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


EXACT: dict[str, Callable[[Tensors], Any]] = {
    "as saved": lambda tensors: None,
    "with copies of the tied tensors": lambda tensors: tensors.update({
        f"{DECODER}.weight": tensors[EMBEDDING].clone(), f"{DECODER}.bias": tensors["cls.predictions.bias"].clone(),
    }),
    "with the position ids of older versions": lambda tensors: tensors.update({
        "bert.embeddings.position_ids": torch.arange(16)[None],
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "as saved" else pytest.mark.slow) for name in EXACT]
)
def test_the_imported_run_is_the_model(base: Path, tmp_path: Path, name: str) -> None:
    """The import compares its logits with those of transformers; the export returns each tensor bit for bit."""
    folder = changed(base, tmp_path / "hf", EXACT[name])
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["import", str(folder), "--run_dir", str(run), "--device", "cpu"]) == 0
    assert main(["export", str(run), "--output", str(again), "--device", "cpu"]) == 0
    given, found = load_file(base / "model.safetensors"), load_file(again / "model.safetensors")
    tied = {f"{DECODER}.weight", f"{DECODER}.bias"}
    assert found.keys() - tied == given.keys() - tied
    assert all(found[key].equal(given[key]) for key in found.keys() - tied)


DISTANCES = {
    f"bert.encoder.layer.{layer}.attention.self.distance_embedding.weight": torch.ones(31, 16) for layer in (0, 1)
}
REFUSED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "relative positions by the setting": (
        lambda tensors: None,
        {"position_embedding_type": "relative_key"},
        "position_embedding_type must",
    ),
    "relative positions by the tensors": (lambda tensors: tensors.update(DISTANCES), {}, "distance_embedding.weight and 1 more"),
    "another decoder": (
        lambda tensors: tensors.update({f"{DECODER}.weight": tensors[EMBEDDING] + 1}),
        {},
        f"{DECODER}.weight differs from {EMBEDDING}",
    ),
    "another bias of the decoder": (
        lambda tensors: tensors.update({f"{DECODER}.bias": tensors["cls.predictions.bias"] + 1}),
        {},
        f"{DECODER}.bias differs from cls.predictions.bias",
    ),
    "a third layer": (
        lambda tensors: tensors.update({
            key.replace("layer.1.", "layer.2."): value.clone() for key, value in tensors.items() if "layer.1." in key
        }),
        {},
        "have bert.encoder.layer.2.",
    ),
    "a decoder": (lambda tensors: None, {"is_decoder": True}, "is_decoder must be False"),
    "three token types": (lambda tensors: None, {"type_vocab_size": 3}, "type_vocab_size must be 2"),
    "a dropout above 1": (lambda tensors: None, {"hidden_dropout_prob": 2.0}, "hidden_dropout_prob must be at least 0 and less than 1"),
    "heads of unequal size": (lambda tensors: None, {"num_attention_heads": 3}, "num_attention_heads must divide hidden_size"),
    "no head": (lambda tensors: tensors.pop("cls.predictions.bias"), {}, "have no cls.predictions.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(base: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, settings, message = REFUSED[name]
    folder = changed(base, tmp_path / "hf", change, **settings)
    assert main(["import", str(folder), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]) == 4
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
