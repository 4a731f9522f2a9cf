"""Evaluation of a run's checkpoints on two processes, compared with a loop over single tokens."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from tiny import VOCAB, read_weights, tiny_config, train, write_corpus

from megatron_lion.cli import main
from megatron_lion.config import RunConfig

STEPS, STRIDE = 4, 5
TEXT = " ".join(f"w{(7 * i * i + 3 * i) % VOCAB}" for i in range(75))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each word, w0 to w119."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def train_and_evaluate(rank: int, config: RunConfig, text: str) -> dict[str, Any]:
    """Trains a short run, evaluates its checkpoints by `evaluate`, and the last one by a plain loop; on each process."""
    import torch

    from megatron_lion.evaluate.open_run import open_run

    train(config)
    run_dir = Path(config.run_dir)
    if rank == 0:
        save_tokenizer(run_dir / "tokenizer")
    torch.distributed.barrier()
    codes = []
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for _ in range(2):
            words = ["evaluate", str(run_dir), "--steps", "all", "--text", text, "--stride", f"{STRIDE},full"]
            codes.append(main([*words, "--device", "cpu", "--batch-size", "3"]))
            torch.distributed.barrier()
    expected = torch.zeros((), dtype=torch.float64)
    with open_run(run_dir, device="cpu", precision="fp32") as run:
        run.load(STEPS)
        ids = run.tokenizer.encode(TEXT)
        for target in range(1, len(ids)):
            start = max(0, -(-(target - run.seq_length) // STRIDE)) * STRIDE
            logits = run.logits(torch.tensor([ids[start:target]]), 1)[0, -1].double()
            expected -= logits.log_softmax(-1)[ids[target]]
    return {"codes": codes, "shown": shown.getvalue(), "loss": float(expected) / (len(ids) - 1), "n_tok": len(ids)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("evaluate")
    text = root / "text.txt"
    text.write_text(TEXT)
    config = tiny_config(
        root / "run", write_corpus(root / "corpus"), train__steps=STEPS, checkpoint__at_steps=[2], optimizer__lr=1e-2
    )
    return root / "run", text, run_distributed(train_and_evaluate, 2, config, str(text))


def test_two_processes_score_a_checkpoint_as_a_plain_loop_does(evaluated: Any) -> None:
    run_dir, _, outcomes = evaluated
    assert [outcome["codes"] for outcome in outcomes] == [[0, 0], [0, 0]]
    record = json.loads(next((run_dir / "eval").glob(f"text-step_000000{STEPS}-*stride{STRIDE}.json")).read_text())
    assert record["n_tok"] == outcomes[0]["n_tok"] == record["num_targets"] + 1
    # fp32 logits; padding and batching change the order of additions only.
    assert record["loss"] == pytest.approx(outcomes[0]["loss"], rel=1e-5)


def test_all_steps_are_evaluated_once_and_found_again(evaluated: Any) -> None:
    run_dir, _, outcomes = evaluated
    records = [json.loads(path.read_text()) for path in sorted((run_dir / "eval").glob("*.json"))]
    assert sorted((r["step"], r["stride"]) for r in records) == [(2, 5), (2, 16), (STEPS, 5), (STEPS, 16)]
    assert outcomes[0]["shown"].count(" new ") == outcomes[0]["shown"].count(" found ") == 4
    assert outcomes[1]["shown"] == ""
    assert len({r["state_sha256"] for r in records}) == 2
    assert len({r["loss"] for r in records}) == 4


def test_one_process_finds_what_two_measured(evaluated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, text, _ = evaluated
    checkpoint = run_dir / "checkpoints" / "step_0000002"
    words = ["evaluate", str(checkpoint), "--text", str(text), "--stride", "full", "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count(" found ") == 1
    assert " new " not in shown


def test_mistakes_about_a_run_are_one_line(evaluated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, text, _ = evaluated
    base = ["evaluate", str(run_dir), "--text", str(text), "--stride", "full", "--device", "cpu"]
    assert main([*base, "--steps", "3"]) == 4
    assert main([*base, "--tokenizer", str(tmp_path / "none")]) == 3
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert "there are: 2, 4" in errors[0]


def test_swapped_checkpoints_are_not_evaluated(
    evaluated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would be reported, and drawn by compare, as the other."""
    run_dir, text, _ = evaluated
    copy = Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("eval")))
    first, second = (copy / "checkpoints" / f"step_000000{step}" for step in (2, STEPS))
    first.rename(copy / "away")
    second.rename(first)
    (copy / "away").rename(second)
    for verb in (
        ["evaluate", "--text", str(text), "--steps", "all", "--stride", "full"],
        ["generate"],
        ["export", "--output", f"{copy}-hf"],
    ):
        assert main([verb[0], str(copy), *verb[1:], "--device", "cpu"]) == 4
        error = capsys.readouterr().err.strip()
        assert ": holds step " in error
        assert "\n" not in error
    assert not (copy / "eval").exists()
    assert not Path(f"{copy}-hf").exists()


def test_weights_that_arrive_otherwise_than_saved_are_refused(
    evaluated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One exponent bit of one weight is changed, and the file's digest and size in the manifest fit it."""
    run_dir, text, _ = evaluated
    copy = Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("eval")))
    folder = copy / "checkpoints" / f"step_000000{STEPS}"
    row = read_weights(copy, STEPS)["model.decoder.final_layernorm.weight"].numpy().tobytes()
    evaluate = ["evaluate", str(copy), "--text", str(text), "--stride", "full", "--device", "cpu"]
    assert main([*evaluate, "--precision", "bf16"]) == 0  # weights saved in fp32 are compared before they are rounded
    places = [path for path in folder.glob("*.distcp") if row in path.read_bytes()]
    assert places
    for path in places:
        content = bytearray(path.read_bytes())
        content[content.index(row) + 3] ^= 1  # little-endian fp32: the lowest bits of the exponent begin here
        path.write_bytes(bytes(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for path in places:
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    export = ["export", str(copy), "--output", f"{copy}-hf", "--device", "cpu"]
    for words in (evaluate, [*evaluate, "--precision", "bf16", "--max-tokens", "20"], ["generate", str(copy)], export):
        assert main(words) == 4, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "fingerprint" in error, words
        assert "was saved" in error
    assert not Path(f"{copy}-hf").exists()
