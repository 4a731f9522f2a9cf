"""A stored result is reused, compared and explained only for the model that it was measured on."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from megatron_lion.cli import main

SEQ_LENGTH = 16
TEXTS = {"a.txt": "the cat and the dog, and the other one. " * 3, "b.txt": "another text of the same words and letters"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a GPT-2 with large weights (`hf`), one with another epsilon (`hf-other`), and their imports."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("states")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS.values(), vocab_size=280, special_tokens=["<|endoftext|>"])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=bpe.get_vocab_size(), n_positions=SEQ_LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "hf")
    bpe.save_model(str(folder / "hf"))
    shutil.copytree(folder / "hf", folder / "hf-other")
    edit_json(folder / "hf-other" / "config.json", layer_norm_epsilon=0.1)
    for name in ("hf", "hf-other"):
        run = folder / name.replace("hf", "run")
        assert main(["import", str(folder / name), "--run_dir", str(run), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def work(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "work"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_setting(run: Path, old: str, new: str) -> None:
    path = run / "config.yaml"
    content = path.read_text()
    assert content.count(f" {old}\n") == 1, old
    path.write_text(content.replace(f" {old}\n", f" {new}\n"))


def scale_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: value * 1.3 for name, value in load_file(path).items()}, path, {"format": "pt"})


def loss_by_transformers(folder: Path, text: str) -> float:
    """Returns the loss in nats with windows that do not overlap."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).encode(text).ids
    total = 0.0
    for start in range(0, len(ids) - 1, SEQ_LENGTH):
        part = torch.tensor([ids[start : start + SEQ_LENGTH + 1]])
        with torch.no_grad():
            logits = model(part[:, :-1]).logits[0].double()
        total -= float(logits.log_softmax(-1).gather(1, part[0, 1:, None]).sum())
    return total / (len(ids) - 1)


def evaluate(capsys: pytest.CaptureFixture[str], target: Path, *names: str) -> tuple[int, str, str]:
    """Returns the exit code, what was printed, and the messages."""
    words = ["--text", *(str(target.parent / name) for name in names), "--stride", "full", "--device", "cpu"]
    code = main(["evaluate", str(target), *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def stored(target: Path, name: str) -> dict[str, Any]:
    records = [json.loads(path.read_text()) for path in (target / "eval").glob("*.json")]
    [record] = [record for record in records if record["text_path"].endswith(name)]
    return dict(record)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layernorm_epsilon: 1.0e-05", "layernorm_epsilon: 0.5", "model.layernorm_epsilon: 1e-05, now 0.5"),
        ("gelu: tanh", "gelu: erf", "model.gelu: tanh, now erf"),
    ],
)
def test_a_run_whose_settings_describe_another_network_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, says: str
) -> None:
    run = work / "run"
    assert " new " in evaluate(capsys, run, "a.txt")[1]
    edit_setting(run, old, new)
    code, _, error = evaluate(capsys, run, "a.txt")
    assert code == 4
    assert says in error
    assert str(run / "config.yaml") in error
    assert "\n" not in error.strip()
    for words in (["generate", str(run)], ["export", str(run), "--output", str(work / "out")]):
        assert main([*words, "--device", "cpu"]) == 4
        assert says in capsys.readouterr().err
    edit_setting(run, new, old)
    assert " found " in evaluate(capsys, run, "a.txt")[1]


def test_settings_that_leave_the_function_unchanged_keep_results(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "run"
    assert " new " in evaluate(capsys, run, "a.txt")[1]
    edit_setting(run, "log_every: 10", "log_every: 7")
    edit_setting(run, "tensor_model_parallel_size: 1", "tensor_model_parallel_size: 2")
    edit_setting(run, "attention: auto", "attention: unfused")
    edit_setting(run, "hidden_dropout: 0.0", "hidden_dropout: 0.3")
    edit_setting(run, "precision: bf16", "precision: fp32")
    moved = run.rename(work / "moved")
    code, shown, error = evaluate(capsys, moved, "a.txt")
    assert code == 0, error
    assert " found " in shown


def test_results_of_equal_weights_in_another_network_are_measured_again(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = work / "run", work / "run-other"
    manifests = [json.loads(next(path.glob("checkpoints/*/manifest.json")).read_text()) for path in (run, other)]
    assert len({manifest["weights_fingerprint"] for manifest in manifests}) == 1
    assert " new " in evaluate(capsys, run, "a.txt")[1]
    shutil.copytree(run / "eval", other / "eval")
    assert " new " in evaluate(capsys, other, "a.txt")[1]
    assert stored(other, "a.txt")["loss"] == pytest.approx(
        loss_by_transformers(work / "hf-other", TEXTS["a.txt"]), abs=1e-5
    )
    # Results of earlier versions name the weights alone.
    [path] = (other / "eval").glob("*.json")
    record = json.loads(path.read_text()) | {"state_sha256": manifests[1]["weights_fingerprint"], "loss": 1.0}
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "sha256"}))
    assert " new " in evaluate(capsys, other, "a.txt")[1]


def compare(capsys: pytest.CaptureFixture[str], work: Path, *folders: Path) -> tuple[int, list[float], str]:
    """Returns the exit code, the references' log perplexities in all tables, and the messages but for the report's."""
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    code = main(["compare", *map(str, folders), "--output", str(output), "--no-figures"])
    rows = [row for path in output.glob("log-perplexity*.csv") for row in csv.DictReader(path.read_text().splitlines())]
    return code, sorted(float(row["reference"]) for row in rows), capsys.readouterr().err.partition("report:")[0]


def test_results_of_replaced_weights_are_not_compared(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = work / "hf"
    assert evaluate(capsys, hf, *TEXTS)[0] == 0
    before = sorted(loss_by_transformers(hf, text) for text in TEXTS.values())
    code, shown, error = compare(capsys, work, hf)
    assert (code, error) == (0, "")
    assert shown == pytest.approx(before, abs=1e-5)

    scale_weights(hf)
    after = {name: loss_by_transformers(hf, text) for name, text in TEXTS.items()}
    assert min(abs(a - b) for a in after.values() for b in before) > 0.01
    code, shown, error = compare(capsys, work, hf)
    assert (code, shown) == (4, [])
    assert error.count("\n") == 1
    assert f"{hf}: all results are of another state of the model; measure again: megatron-lion evaluate {hf}" in error

    assert evaluate(capsys, hf, "a.txt")[0] == 0
    code, shown, error = compare(capsys, work, hf)
    assert code == 0
    assert shown == pytest.approx([after["a.txt"]], abs=1e-5)
    assert error.count("\n") == 1
    assert "1 of 2 results are of another state of the model and are not used" in error

    remedy = shlex.split(error.partition("measure again: megatron-lion ")[2])
    assert main(remedy) == 0
    capsys.readouterr()
    code, shown, error = compare(capsys, work, hf)
    assert (code, error) == (0, "")
    assert shown == pytest.approx(sorted(after.values()), abs=1e-5)

    edit_json(hf / "config.json", layer_norm_epsilon=0.3)
    assert compare(capsys, work, hf)[0] == 4


def test_results_of_another_import_are_not_compared(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = work / "run", work / "run-other"
    assert evaluate(capsys, run, "a.txt")[0] == 0
    assert evaluate(capsys, other, "a.txt", "b.txt")[0] == 0
    (other / "eval").rename(work / "eval-other")
    shutil.copytree(run / "eval", other / "eval")
    code, _, error = compare(capsys, work, other)
    assert code == 4
    assert "all results are of another state of the model" in error
    # Only the small files of a run were copied: its results must be of one model.
    shutil.rmtree(other / "checkpoints")
    code, shown, _ = compare(capsys, work, other)
    assert (code, len(shown)) == (0, 1)
    [path] = [path for path in (work / "eval-other").glob("*.json") if "b.txt" in path.read_text()]
    shutil.copy(path, other / "eval")
    code, _, error = compare(capsys, work, other)
    assert code == 4
    assert "the results are of several models" in error


def test_explain_uses_results_of_the_present_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = work / "hf"
    words = [
        "evaluate",
        str(hf),
        "--wikitext103",
        str(work / "a.txt"),
        "--stride",
        "8",
        "--device",
        "cpu",
        "--pages",
        "false",
    ]
    assert main(words) == 0
    [path] = (hf / "eval").glob("wikitext103-*.json")
    record = json.loads(path.read_text()) | {"stride": 32, "text_version": "WikiText-103 tokens test"}
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "sha256"}))
    explain = ["evaluate", str(hf), "--explain", "19.31"]
    number = f"{record['adjusted_ppl']:.4f} (adjusted_ppl of wikitext103)"
    capsys.readouterr()
    assert main(explain) == 0
    assert number in capsys.readouterr().out
    scale_weights(hf)
    assert main(explain) == 0
    shown = capsys.readouterr()
    assert number not in shown.out
    assert "not measured yet (adjusted_ppl" in shown.out
    assert "1 of 1 results are of another state of the model" in shown.err
