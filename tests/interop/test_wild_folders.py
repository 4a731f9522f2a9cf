"""Hugging Face folders as other tools write them: `import` and `evaluate` reproduce the model, or it is rejected."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lion.cli import main
from megatron_lion.data.tokenizer_files import byte_letters

LETTERS = [*byte_letters(), "th", "the", "<|endoftext|>"]
TEXT = "the cat and the dog, and the other " * 6
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 264}
SHARED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 258, "eos_token_id": 258}
Change = Callable[[Path], Any]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """A change of the tensors in model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = tensors_of(folder)
        changed = change(tensors)
        save_file(changed if isinstance(changed, dict) else tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def settings(*removed: str, **changes: Any) -> Change:
    """A change of config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if name not in removed}))

    return apply


def renamed(folder: Path) -> None:
    """Writes config.json with the attribute names that transformers uses for all models."""
    names = {
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    path = folder / "config.json"
    path.write_text(json.dumps({names.get(name, name): value for name, value in json.loads(path.read_text()).items()}))


def in_parts(folder: Path) -> None:
    network(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()


def with_old_parts(folder: Path) -> None:
    """Adds an older model's index and parts beside the file that was saved later."""
    model = network(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder / "old", max_shard_size="40KB")
    for path in (folder / "old").glob("model*"):
        path.rename(folder / path.name)
    shutil.rmtree(folder / "old")


def add(name: str, value: Any = None) -> Change:
    return stored(lambda tensors: tensors.__setitem__(name, torch.ones(3) if value is None else value(tensors)))


EMPTY = torch.ones(2)
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
EXACT: dict[str, Change] = {
    "as saved": lambda folder: None,
    "in parts": in_parts,
    "an older index beside the file": with_old_parts,
    "tanh by another name": settings(activation_function="gelu_fast"),
    "erf": settings(activation_function="gelu"),
    "epsilon 0.1, n_inner null": settings(layer_norm_epsilon=0.1, n_inner=None),
    "names of all models": renamed,
    "defaults left out": settings("layer_norm_epsilon", "activation_function", "initializer_range", "tie_word_embeddings", "n_inner"),
    "without prefix": stored(lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()}),
    "a copy of the embedding as the head": add(HEAD, lambda tensors: tensors[EMBEDDING].clone()),
    "the head alone": stored(lambda tensors: tensors.__setitem__(HEAD, tensors.pop(EMBEDDING))),
    "constants of older versions": stored(
        lambda tensors: tensors.update({
            "transformer.h.1.attn.bias": torch.ones(1, 1, 16, 16).tril(), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        })
    ),
    "bf16": stored(lambda tensors: {name: value.bfloat16() for name, value in tensors.items()}),
}  # fmt: skip
SLOW = ("tanh by another name", "without prefix", "epsilon 0.1, n_inner null", "erf", "bf16")
REFUSED: dict[str, tuple[Change, str]] = {
    "another head": (add(HEAD, lambda tensors: tensors[EMBEDDING] * 1.01), "lm_head.weight differs from transformer.wte.weight"),
    "a third layer": (
        stored(
            lambda tensors: tensors | {name.replace("h.1.", "h.2."): value.clone() for name, value in tensors.items() if "h.1." in name}
        ),
        "have transformer.h.2.attn.c_attn.bias and 11 more",
    ),
    "a mask of a third layer": (add("transformer.h.2.attn.bias"), "have transformer.h.2.attn.bias"),
    "an adapter": (add("transformer.h.0.attn.c_attn.lora_A.weight"), "lora_A.weight, which"),
    "an adapter without prefix": (
        stored(lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()} | {"h.0.lora_B": EMPTY}),
        "have h.0.lora_B",
    ),
    "an unknown setting": (settings(rotary_dim=8), "unknown setting rotary_dim"),
    "code of another model": (settings(auto_map={"AutoModel": "code.Model"}), "unknown setting auto_map"),
    "quantised": (settings(quantization_config={"bits": 4}), "unknown setting quantization_config"),
    "pruned": (settings(pruned_heads={"0": [1]}), "pruned_heads must be {}"),
    "a wrong type": (settings(n_layer="two"), "config.json: "),
    "a dropout above 1": (settings(resid_pdrop=1.5), "config.json: resid_pdrop must be at least 0 and less than 1, got 1.5"),
    "a dropout of 1": (settings(attn_pdrop=1), "config.json: attn_pdrop must be at least 0 and less than 1, got 1"),
    "a negative dropout": (settings(embd_pdrop=-1), "config.json: embd_pdrop must be at least 0 and less than 1, got -1"),
    "an epsilon that is no number": (settings(layer_norm_epsilon=math.nan), "layer_norm_epsilon must be a finite number of at least 0"),
    "a negative inner size": (settings(n_inner=-5), "config.json: n_inner must be an integer of at least 1, got -5"),
    "heads of unequal size": (settings(n_head=3), "config.json: n_head must divide n_embd, got 3 and 32"),
    "no layer": (settings(n_layer=0), "num_layers must be an integer of at least 1"),
    "untied": (settings(tie_word_embeddings=False), "tie_word_embeddings must be True"),
}  # fmt: skip


def network(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def with_tokenizer(folder: Path) -> Path:
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(LETTERS)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 with large weights, so that a change of any tensor or setting changes the loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("wild")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **SHARED, n_inner=128))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "hf")
    (folder / "text.txt").write_text(TEXT)
    return with_tokenizer(folder / "hf").parent


def loss_of(capsys: pytest.CaptureFixture[str], target: Path, text: Path) -> tuple[float, str]:
    """Returns the loss in nats that `evaluate` reports, and what it printed."""
    assert main(["evaluate", str(target), "--text", str(text), "--device", "cpu", "--stride", "full"]) == 0
    shown = capsys.readouterr()
    (path,) = (target / "eval").glob("text-*.json")
    return float(json.loads(path.read_text())["loss"]), shown.out + shown.err


@torch.no_grad()
def oracle_loss(folder: Path) -> float:
    """Returns transformers' mean loss over windows of n_positions predictions, summed in float64."""
    ids = []
    letters = {token: index for index, token in enumerate(LETTERS)}
    for word in TEXT.replace(" ", " \u0120").split(" ")[:-1]:  # merges: th, the
        rest = word
        while rest:
            token = next(piece for piece in ("the", "th", rest[0]) if rest.startswith(piece))
            ids.append(letters[token])
            rest = rest[len(token) :]
    ids += [letters["\u0120"]]
    tokens, model, total = torch.tensor(ids), network(folder), 0.0
    for start in range(0, len(ids) - 1, 16):
        window = tokens[start : start + 17]
        logits = model(window[None, :-1]).logits[0].double()
        total -= float(logits.log_softmax(-1).gather(1, window[1:, None]).sum())
    return total / (len(ids) - 1)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXACT])
def test_the_imported_run_is_the_model(
    base: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(base / "hf", folder)
    EXACT[name](folder)
    expected = oracle_loss(folder)
    found, shown = loss_of(capsys, folder, base / "text.txt")
    assert math.isclose(found, expected, rel_tol=1e-6)
    assert main(["import", str(folder), "--run_dir", str(run), "--device", "cpu"]) == 0
    shown += capsys.readouterr().err
    assert shown.count("model.safetensors.index.json and its files are not") == (2 if "index" in name else 0)
    assert math.isclose(loss_of(capsys, run, base / "text.txt")[0], expected, rel_tol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(base: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(base / "hf", folder)
    change, said = REFUSED[name]
    change(folder)
    assert main(["import", str(folder), "--run_dir", str(run), "--device", "cpu"]) == 4
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_adapter_beside_the_weights_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With peft installed, transformers would compute another model from this folder."""
    folder = tmp_path / "hf"
    shutil.copytree(base / "hf", folder)
    lora = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    save_file(
        {lora.format("A"): torch.ones(2, 32), lora.format("B"): torch.ones(96, 2)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}')
    for command in (
        ["import", str(folder), "--run_dir", str(tmp_path / "run"), "--device", "cpu"],
        ["evaluate", str(folder), "--text", str(base / "text.txt"), "--device", "cpu"],
    ):
        assert main(command) == 4
        error = capsys.readouterr().err
        assert f"{folder}/adapter_config.json: the folder has a PEFT adapter" in error
        assert "merge_and_unload() and give the folder of save_pretrained" in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not (folder / "eval").exists()


def test_weights_that_transformers_reads_otherwise_make_no_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lion.interop.hf_folder.GELU_NAMES", {"gelu_new": "erf"})
    command = ["import", str(base / "hf"), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(command) == 4
    assert "transformers computes other logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--check", "false"]) == 0


def test_results_of_another_model_in_the_same_folder_are_not_reused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(base / "hf", folder)
    in_parts(folder)
    seen: list[float] = []
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1

    def other_weights() -> None:
        tensors = {name: value * 1.1 for name, value in load_file(parts[-1]).items()}
        save_file(tensors, parts[-1], {"format": "pt"})

    for change in (lambda: None, other_weights, lambda: settings(layer_norm_epsilon=0.1)(folder)):
        change()
        found, shown = loss_of(capsys, folder, base / "text.txt")
        assert "new" in shown
        assert math.isclose(found, oracle_loss(folder), rel_tol=1e-6)
        assert found not in seen
        seen.append(found)
    assert "found" in loss_of(capsys, folder, base / "text.txt")[1]
    record = json.loads(next((folder / "eval").glob("text-*.json")).read_text())
    assert {"torch", "transformers", "tokenizers", "megatron_lion"} <= record["versions"].keys()


def test_dropouts_that_a_run_cannot_keep_are_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base / "hf", tmp_path / "hf")
    settings(resid_pdrop=0.3, embd_pdrop=0.0)(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "embd_pdrop is 0 and resid_pdrop 0.3" in capsys.readouterr().err


def test_shapes_of_another_config_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base / "hf", tmp_path / "hf")
    settings(n_positions=8)(tmp_path / "hf")
    assert main(["evaluate", str(tmp_path / "hf"), "--text", str(base / "text.txt"), "--device", "cpu"]) == 4
    assert "transformer.wpe.weight has shape (16, 32), but config.json gives (8, 32)" in capsys.readouterr().err
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert main(["evaluate", str(tmp_path / "hf"), "--text", str(base / "text.txt"), "--device", "cpu"]) == 4
    assert "save_pretrained('NEW')" in capsys.readouterr().err
