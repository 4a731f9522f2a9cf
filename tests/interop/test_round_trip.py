"""A run exported and imported again has the same bits, logits and evaluation, and trains further."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_bert import tiny_bert, write_bert_corpus
from tiny_gpt2 import VOCAB, WORDS, tiny_gpt2, write_text_corpus

from megatron_lion.cli import main
from megatron_lion.configfile import load_config
from megatron_lion.interop import hf_export

STEPS = 3
TP2 = {"parallel__tensor_model_parallel_size": 2}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs gpt2, gpt2-bf16, gpt2-erf and bert, their exports NAME-hf, and imports NAME-again of the exports."""
    folder = tmp_path_factory.mktemp("interop")
    text, sentences = write_text_corpus(folder / "text"), write_bert_corpus(folder / "sentences")
    # Large weights, because the two forms of GELU are nearly equal at zero and must differ here.
    common = {"train__steps": STEPS, "optimizer__lr": 1e-2, "train__test_every": 0, "model__init_method_std": 0.2}
    jobs = {
        "gpt2": (2, tiny_gpt2(folder / "gpt2", text, **common, **TP2)),
        "gpt2-bf16": (1, tiny_gpt2(folder / "gpt2-bf16", text, train__precision="bf16", **common)),
        "gpt2-erf": (
            1,
            tiny_gpt2(folder / "gpt2-erf", text, model__gelu="erf", model__layernorm_epsilon=1e-3, **common),
        ),
        "bert": (2, tiny_bert(folder / "bert", sentences, **common)),
    }
    for name, outcome in tiny.run_all(jobs).items():
        assert "failed" not in outcome, (name, outcome)
    (folder / "eval.txt").write_text(" ".join(WORDS * 12))
    assert (
        main(["evaluate", str(folder / "gpt2"), "--text", str(folder / "eval.txt"), "--device", "cpu", "--stride", "4"])
        == 0
    )
    for name in jobs:
        assert main(["export", str(folder / name), "--output", str(folder / f"{name}-hf"), "--device", "cpu"]) == 0
        assert (
            main(["import", str(folder / f"{name}-hf"), "--run_dir", str(folder / f"{name}-again"), "--device", "cpu"])
            == 0
        )
    return folder


@pytest.mark.parametrize("name", ["gpt2", "gpt2-bf16", "gpt2-erf", "bert"])
def test_round_trip_is_bit_exact(folder: Path, name: str, tmp_path: Path) -> None:
    assert main(["export", str(folder / f"{name}-again"), "--output", str(tmp_path / "hf"), "--device", "cpu"]) == 0
    first, second = (
        load_file(folder / f"{name}-hf" / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(tiny.same_bits(first[key], second[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16 if "bf16" in name else torch.float32}
    for file in ("config.json", "vocab.txt" if name == "bert" else "merges.txt"):
        assert (folder / f"{name}-hf" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_all_files_have_the_permissions_that_the_umask_leaves(folder: Path) -> None:
    """Runs with checkpoints, their evaluation, exports and imports: what one person writes, a colleague can read."""
    os.umask(umask := os.umask(0))
    entries = [path for path in folder.rglob("*") if not path.is_symlink()]
    wrong = {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for path in entries
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= {
        path.name for path in entries
    }


def test_exported_weights_are_the_checkpoints(folder: Path) -> None:
    """The exported tensors equal those that torch's own reader finds in the sharded checkpoint."""
    stored, exported = tiny.read_weights(folder / "gpt2", STEPS), load_file(folder / "gpt2-hf" / "model.safetensors")
    assert torch.equal(exported["transformer.wpe.weight"], stored["model.embedding.position_embeddings.weight"])
    assert (
        exported["transformer.wte.weight"].shape[0] == VOCAB < stored["model.embedding.word_embeddings.weight"].shape[0]
    )
    assert torch.equal(exported["transformer.wte.weight"], stored["model.embedding.word_embeddings.weight"][:VOCAB])


@pytest.mark.parametrize("name", ["gpt2", "gpt2-erf"])
def test_gpt2_logits_are_transformers(folder: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_lion.evaluate.open_run import open_run

    model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-hf").eval()
    ids = AutoTokenizer.from_pretrained(folder / f"{name}-hf")("the sign of a gradient falls", return_tensors="pt")[
        "input_ids"
    ]
    with open_run(folder / name, device="cpu") as run:
        assert ids[0].tolist() == run.tokenizer.encode("the sign of a gradient falls")
        run.load(STEPS)
        ids = ids[:, : run.seq_length]
        with torch.no_grad():
            expected, found = model(ids).logits, run.logits(ids, ids.shape[1])
    assert expected.abs().max() > 0.1
    assert (expected - found).abs().max() < TOLERANCE


def test_the_flavours_of_gelu_differ(folder: Path) -> None:
    """If they were equal, the test above would pass with a wrong name."""
    config = json.loads((folder / "gpt2-erf-hf" / "config.json").read_text())
    assert config["activation_function"] == "gelu"
    assert json.loads((folder / "gpt2-hf" / "config.json").read_text())["activation_function"] == "gelu_new"
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2-erf-hf").eval()
    other = GPT2LMHeadModel(GPT2Config(**{**config, "activation_function": "gelu_new"})).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert (model(ids).logits - other(ids).logits).abs().max() > 2 * TOLERANCE


def test_bert_logits_are_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer, MegatronBertForPreTraining

    from megatron_lion.evaluate.open_run import open_run

    model = MegatronBertForPreTraining.from_pretrained(folder / "bert-hf").eval()
    batch = AutoTokenizer.from_pretrained(folder / "bert-hf")("baid fiog.", "geac dodh abc.", return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch)
    with open_run(folder / "bert", device="cpu") as run:
        run.load(STEPS)
        logits_MV, order_2 = run.bert_logits(
            batch["input_ids"], batch["token_type_ids"], list(range(batch["input_ids"].shape[1]))
        )
    assert batch["token_type_ids"].sum() > 0
    assert (expected.prediction_logits[0] - logits_MV).abs().max() < TOLERANCE
    assert (expected.seq_relationship_logits[0] - order_2).abs().max() < TOLERANCE


@pytest.mark.parametrize("target", ["gpt2-hf", "gpt2-again"])
def test_the_same_evaluation(folder: Path, target: str) -> None:
    """The export is evaluated by transformers' network, the import by ours with new padding rows."""
    words = ["evaluate", str(folder / target), "--text", str(folder / "eval.txt"), "--device", "cpu", "--stride", "4"]
    assert main(words) == 0
    loss = {
        name: json.loads(next((folder / name / "eval").glob("*.json")).read_text())["loss"] for name in ("gpt2", target)
    }
    assert loss[target] == pytest.approx(loss["gpt2"], abs=1e-6)


def test_the_card_says_what_was_measured(folder: Path) -> None:
    card = (folder / "gpt2-hf" / "README.md").read_text()
    result = json.loads(next((folder / "gpt2" / "eval").glob("*.json")).read_text())
    for words in (f"{result['loss']:.4f}", "stride 4", "optimizer lion", "license: other", result["text_sha256"][:8]):
        assert words in card
    assert "not trained here" not in card
    assert "Not yet evaluated on a full text." in (folder / "bert-hf" / "README.md").read_text()


def test_the_card_lists_no_result_of_another_state(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stored result is of the same step, but was measured on other weights or another epsilon."""
    run = Path(shutil.copytree(folder / "gpt2", tmp_path / "run"))
    path = next((run / "eval").glob("*.json"))
    result = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_text(json.dumps(result | {"state_sha256": "0" * 64}))
    assert main(["export", str(run), "--output", str(tmp_path / "hf"), "--device", "cpu"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{result['loss']:.4f}" not in card
    assert "Not yet evaluated on a full text." in card
    assert (
        "1 of 1 results are of another state of the model and are not used; measure again: " in capsys.readouterr().err
    )


def test_the_card_names_weights_that_were_converted_after_the_measurement(folder: Path, tmp_path: Path) -> None:
    words = ["export", str(folder / "gpt2"), "--output", str(tmp_path / "hf"), "--device", "cpu", "--dtype", "bf16"]
    assert main(words) == 0
    sentence = "before they were converted to bfloat16"
    assert sentence in (tmp_path / "hf" / "README.md").read_text()
    assert "before they were converted" not in (folder / "gpt2-hf" / "README.md").read_text()


def test_the_run_folder_of_an_import_may_be_given_as_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "import",
        str(folder / "gpt2-hf"),
        "--device",
        "cpu",
        "--check",
        "false",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert tiny.read_weights(tmp_path / "run", 0).keys() == tiny.read_weights(folder / "gpt2-again", 0).keys()
    assert f"run_dir: {tmp_path / 'run'}" in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert main([*words, "--run_dir", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (
        f"megatron-lion: --output {tmp_path / 'run'} and --run_dir {tmp_path / 'other'} name two folders for one run; give one "
        "of them\n"
    )


def going_on(folder: Path) -> dict[str, tuple[int, Any]]:
    """Imported runs that train further at other layouts than before."""
    text, sentences = str(folder / "text" / "data"), str(folder / "sentences" / "data")
    more = {
        "train__steps": 2,
        "optimizer__lr": 1e-2,
        "optimizer__name": "sgd",
        "probe__every": 2,
        "probe__num_batches": 1,
    }
    return {
        "gpt2-again": (2, tiny_gpt2(folder / "gpt2-again", text, model__vocab_size=VOCAB, **more)),
        "gpt2-bf16-again": (
            2,
            tiny_gpt2(folder / "gpt2-bf16-again", text, model__vocab_size=VOCAB, train__precision="bf16", **TP2),
        ),
        "bert-again": (
            2,
            tiny_bert(folder / "bert-again", sentences, parallel__pipeline_model_parallel_size=2, **more),
        ),
    }


def test_imported_weights_train_at_any_layout(folder: Path) -> None:
    outcomes = tiny.run_all(going_on(folder))
    for name, outcome in outcomes.items():
        assert "failed" not in outcome, (name, outcome)
    fresh = tiny.run_all({"fresh": (1, tiny_gpt2(folder / "fresh", str(folder / "text" / "data"), train__steps=1))})[
        "fresh"
    ]
    # On words in random order, three steps at a high rate already give most of the possible gain.
    assert outcomes["gpt2-again"]["losses"][0] < fresh["losses"][0] - 0.3
    assert outcomes["gpt2-again"]["probes"][0]["probe/loss"] < fresh["losses"][0] - 0.3
    manifest = outcomes["gpt2-again"]["manifest"]
    assert manifest["step"] == 2
    assert manifest["weights_fingerprint"] != json.loads((folder / "gpt2-again/checkpoints/step_0000000/manifest.json").read_text())[
        "weights_fingerprint"
    ]  # fmt: skip


def test_the_full_gradient_of_an_imported_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An import can be probed: norms and r are measured, and without λ the KKT residual is undefined."""
    run_dir, data = tmp_path / "run", f"[{folder}/text/data]"
    settings = [
        "--data.path",
        data,
        "--train.global_batch_size",
        "8",
        "--train.micro_batch_size",
        "4",
        "--optimizer.weight_decay",
        "0",
    ]
    assert main(["import", str(folder / "gpt2-hf"), "--run_dir", str(run_dir), "--device", "cpu", *settings]) == 0
    assert main(["probe", str(run_dir), "--num-batches", "4", "--device", "cpu"]) == 0
    assert "KKT residual is undefined" in capsys.readouterr().out
    found = json.loads((run_dir / "probe" / "step_0000000.json").read_text())
    assert found["theta"] == "the model's own weights"
    assert found["loss"] < tiny.read_metrics(folder / "gpt2")[-1]["train/loss"] + 0.5
    assert 1 < found["all"]["norm_ratio"] <= found["all"]["num_parameters"] ** 0.5


def test_fresh_begins_with_the_imported_weights_again(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    how = ["--model.loss", "megatron", "--model.attention", "sdpa"]  # how the network is computed: in no config.json
    assert main(["import", str(folder / "gpt2-hf"), "--run_dir", str(run_dir), "--device", "cpu", *how]) == 0
    model = load_config(run_dir / "config.yaml").model
    assert (model.loss, model.attention) == ("megatron", "sdpa")
    config = tiny_gpt2(run_dir, str(folder / "text" / "data"), model__vocab_size=VOCAB, train__steps=1)
    first = tiny.run_all({"run": (1, config)})["run"]
    again = tiny.run_all({"run": (1, config)}, train_fresh)["run"]
    assert again["losses"] == first["losses"]
    assert (tmp_path / "run.old-1" / "checkpoints" / "step_0000001").is_dir()
    assert (run_dir / "checkpoints" / "step_0000000").is_dir()


def train_fresh(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    from megatron_lion.train.loop import pretrain

    for config in configs.values():
        pretrain(config, fresh=True)
    return {name: tiny.outcome(config.run_dir) for name, config in configs.items()}


def test_padding_rows_get_next_to_no_probability(folder: Path) -> None:
    """Their logit is the mean logit, so their share is at most padded / vocabulary of the rest."""
    rows = tiny.read_weights(folder / "gpt2-again", 0)["model.embedding.word_embeddings.weight"]
    hidden = torch.randn(200, rows.shape[1], generator=torch.Generator().manual_seed(1)) * 50
    chances = (hidden @ rows.T).double().softmax(-1)
    padded = rows.shape[0] - VOCAB
    assert padded > 0
    assert (chances[:, VOCAB:].sum(-1) <= padded / (VOCAB + padded) * (1 + 1e-6)).all()


def test_an_export_is_on_the_disk_before_it_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a crash of the machine may leave a folder of the right name with empty files."""
    flushed: set[str] = set()
    real, put = os.fsync, hf_export.replace_folder

    def fsync(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    def replace_folder(new: Path, final: Path) -> None:
        names = {path.name for path in new.iterdir()}
        # write_whole flushes a file under its temporary name
        assert names <= {name.removeprefix(".").removesuffix(".tmp") for name in flushed} | flushed
        put(new, final)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(hf_export, "replace_folder", replace_folder)
    words = ["export", str(folder / "gpt2"), "--output", str(tmp_path / "hf"), "--device", "cpu"]
    assert main(words) == 0
    assert "model.safetensors" in flushed
    assert main([*words, "--overwrite"]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_an_export_without_room_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(*words: Any, **named: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save)
    assert main(["export", str(folder / "gpt2"), "--output", str(tmp_path / "hf"), "--device", "cpu"]) == 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"megatron-lion: .*model.safetensors: cannot be written .*No space left on device.*make room there.*", last
    )
    assert list(tmp_path.iterdir()) == []


def test_older_files_without_prefix_and_in_parts(folder: Path, tmp_path: Path) -> None:
    """The first published GPT-2 files use `wte.weight`; large models have several files with an index."""
    tensors = load_file(folder / "gpt2-hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    halves = [dict(list(bare.items())[::2]), dict(list(bare.items())[1::2])]
    source = tmp_path / "hf"
    source.mkdir()
    for file in ("config.json", "vocab.json", "merges.txt"):
        (source / file).write_bytes((folder / "gpt2-hf" / file).read_bytes())
    for number, half in enumerate(halves):
        save_file(half, source / f"part{number}.safetensors")
    places = {name: f"part{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert main(["import", str(source), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]) == 0
    ours, expected = (tiny.read_weights(path, 0) for path in (tmp_path / "run", folder / "gpt2-again"))
    assert all(tiny.same_bits(ours[name], expected[name]) for name in expected)
