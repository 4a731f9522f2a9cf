"""Export and import reject wrong input with a message of one line and leave no incomplete folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from tiny_gpt2 import tiny_gpt2, write_text_corpus

from megatron_lion.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    config = tiny_gpt2(folder / "run", write_text_corpus(folder / "text"), train__steps=1)
    assert "failed" not in tiny.run_all({"run": (1, config)})["run"]
    assert main(["export", str(folder / "run"), "--output", str(folder / "hf"), "--device", "cpu"]) == 0
    return folder


def refused(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == code
    error = capsys.readouterr().err
    assert error.startswith("megatron-lion: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--architecture", "bert"], 2, "export as megatron-bert"),
        (["--architecture", "megatron-bert"], 2, "the run is a gpt2"),
        (["--step", "7"], 4, "no complete checkpoint of step 7 (there are: 1)"),
    ],
)
def test_export(
    folder: Path, tmp_path: Path, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(folder / "run"), "--output", str(tmp_path / "hf"), "--device", "cpu", *words]
    assert says in refused(command, code, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_export_reaches_the_disk_before_it_gets_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        facts = os.fstat(handle)
        synced.add((facts.st_dev, facts.st_ino))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    command = ["export", str(folder / "run"), "--output", str(tmp_path / "hf"), "--device", "cpu", "--check", "false"]
    assert main(command) == 0
    for name in ("config.json", "generation_config.json", "README.md"):
        facts = (tmp_path / "hf" / name).stat()
        assert (facts.st_dev, facts.st_ino) in synced, name


def test_export_never_replaces_what_it_did_not_make(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    command = ["export", str(folder / "run"), "--device", "cpu", "--output"]
    assert "choose another folder" in refused([*command, str(mine), "--overwrite"], 2, capsys)
    assert (mine / "notes.txt").read_text() == "keep"
    assert "--overwrite" in refused([*command, str(folder / "hf")], 2, capsys)
    assert main([*command, str(folder / "hf"), "--overwrite"]) == 0
    assert "not a run folder" in refused(["export", str(mine), "--output", str(tmp_path / "hf")], 4, capsys)


def test_export_that_transformers_reads_otherwise_is_not_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lion.interop.hf_folder.WRITTEN_GELU", {"tanh": "relu"})
    command = ["export", str(folder / "run"), "--output", str(tmp_path / "hf"), "--device", "cpu"]
    assert "other logits" in refused(command, 4, capsys)
    assert list(tmp_path.iterdir()) == []


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def spoil(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, folder / "model.safetensors")

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (change_config(model_type="bert"), 4, "post-LN"),
        (change_config(model_type="llama"), 4, "model_type llama"),
        (change_config(activation_function="relu"), 4, "'relu'"),
        (change_config(scale_attn_by_inverse_layer_idx=True), 4, "scale_attn_by_inverse_layer_idx"),
        (change_config(tie_word_embeddings=False), 4, "tie_word_embeddings"),
        (change_config(n_positions=8), 4, "position_embeddings.weight has shape (16, 32)"),
        (change_config(n_layer=3), 4, "transformer.h.2.ln_1.weight"),
        (change_config(vocab_size=50), 4, "the tokenizer has 300 ids, the model 50"),
        (drop("transformer.h.1.mlp.c_fc.bias"), 4, "transformer.h.1.mlp.c_fc.bias"),
        (
            spoil("transformer.h.1.ln_2.bias"),
            4,
            "hf: the weight of decoder.layers.1.pre_mlp_layernorm.bias[3] on rank 0 is NaN",
        ),
        (cut("model.safetensors"), 4, "cannot be read"),
        (cut("config.json"), 4, "config.json: cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), 4, "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), 4, "convert the weights to safetensors"),
        (
            lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.json", "merges.txt")],
            3,
            "tokenizer",
        ),
    ],
)
def test_import(
    folder: Path,
    tmp_path: Path,
    change: Callable[[Path], Any],
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder / "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    command = ["import", str(tmp_path / "hf"), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert says in refused(command, code, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_index_cannot_name_files_elsewhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    )
    command = ["import", str(tmp_path / "hf"), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert "no file of this folder" in refused(command, 4, capsys)


def test_import_into_a_folder_that_is_not_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", str(folder / "hf"), "--run_dir", str(folder / "run"), "--device", "cpu"]
    assert "is not empty" in refused(command, 2, capsys)


def test_imported_weights_refuse_other_data_and_shapes(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert main(["import", str(folder / "hf"), "--run_dir", str(run_dir), "--device", "cpu"]) == 0
    other = write_text_corpus(tmp_path / "other", documents=30)
    text = str(folder / "text" / "data")
    jobs = {
        "tokenizer": (1, tiny_gpt2(run_dir, other, model__vocab_size=300)),
        "shape": (1, tiny_gpt2(run_dir, text, model__vocab_size=300, model__seq_length=8)),
        "gelu": (1, tiny_gpt2(run_dir, text, model__vocab_size=300, model__gelu="erf")),
    }
    found = tiny.run_all(jobs, tiny.errors_of_each)
    assert "another tokenizer" in found["tokenizer"][1]
    assert "seq_length 16 (now 8)" in found["shape"][1]
    assert "gelu tanh (now erf)" in found["gelu"][1]
    assert {kind for kind, _ in found.values()} == {"CheckpointError"}


def test_import_says_what_it_cannot_take(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(folder / "hf"), "--run_dir", str(tmp_path / "a run"), "--device", "cpu"]
    assert "optimizer.weight_decay" in refused([*command, "--optimizer.weight_decay", "-1"], 2, capsys)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]) + "\n")
    assert "a WordPiece tokenizer" in refused([*command, "--tokenizer", str(vocab)], 4, capsys)
    assert not (tmp_path / "a run").exists()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*command, "--model.num_layers", "3"]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert any("note: model.num_layers is 2" in line for line in shown)
    assert shown[-2] == f"next: megatron-lion evaluate '{tmp_path}/a run' --text FILE"
    assert f"pretrain --config '{tmp_path}/a run/config.yaml' --data.path '[DATASET]'" in shown[-1]
