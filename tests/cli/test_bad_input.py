"""Wrong settings, files and data give one line that names the key or file, and the code of docs/exit-codes.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import VOCAB, tiny_config, write_corpus

from megatron_lion.cli import main
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config, load_config

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data") / "c_text_document")


def config_file(tmp_path: Path, corpus: str, **changes: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_config(tmp_path / "run", corpus, train__steps=2, **changes)))
    return path


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Runs the command line, asserts its exit code and one message without traceback, and returns stderr."""
    assert main(list(words)) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("megatron-lion: ")]
    assert len(lines) == 1, error
    return error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.lrr", "1"], ["optimizer.lrr", "optimizer.lr"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "fast", "float"]),
        (["--model.num_layers", "2.5"], ["model.num_layers", "2.5", "int"]),
        (["--optimizer.name", "lino"], ["optimizer.name", "lino", "lion"]),
        (["--train.steps", "-4"], ["train.steps", "-4"]),
        (
            ["--train.global_batch_size", "7", "--train.micro_batch_size", "2"],
            ["train.global_batch_size", "7", "try 8"],
        ),
        (["--parallel.tensor_model_parallel_size", "2"], ["tensor_model_parallel_size 2", "1 process"]),
        (["--model.num_attention_heads", "5"], ["model.num_attention_heads", "5", "hidden_size"]),
        (["--optimizer.betas", "[0.9, 1.5]"], ["optimizer.betas", "1.5"]),
        (["--data.weights", "[1, 2]"], ["data.weights", "data.path"]),
        (["--optimizer.momentum_dtype", "int8"], ["optimizer.momentum_dtype", "master_weights"]),
        (
            [
                "--optimizer.momentum_dtype",
                "int8",
                "--optimizer.master_weights",
                "split32",
                "--train.precision",
                "bf16",
                "--optimizer.betas",
                "[0.9,0.999]",
            ],
            ["optimizer.betas: beta2 must be at most 0.99609375 with optimizer.momentum_dtype int8", "got 0.999"],
        ),
        (
            ["--schedule.kind", "constant", "--schedule.min_lr", "1e-5"],
            ["schedule.min_lr: must be 0 with schedule.kind constant"],
        ),
        (["--optimizer.name", "adamw", "--optimizer.lr", "1e38"], ["optimizer.lr: must be at most 3.4e+37 for adamw"]),
        (["--no-such-flag", "1"], ["no-such-flag"]),
        (["--seed", "-1"], ["seed: must be an integer from 0 to 2^63 - 1, got -1"]),
        (["--seed", str(2**63)], ["seed: must be"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_impossible_settings(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    path = config_file(tmp_path, corpus)
    error = refused(capsys, 2, "pretrain", "--config", str(path), *words)
    for part in named:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_all_problems_are_reported_at_once(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, corpus)
    words = ["--train.steps", "0", "--optimizer.lr", "-1", "--model.hidden_dropout", "1.5"]
    assert main(["pretrain", "--config", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ("train.steps", "optimizer.lr", "model.hidden_dropout"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model:\n  num_layer: 2\n", ["num_layer"]),
        ("train:\n  steps: many\n", ["train.steps", "many"]),
        ("seed: 1\nseed: 2\n", ["line 2", "'seed'", "twice"]),
        ("model: [1, 2\n", ["not valid YAML"]),
        ("- a\n- b\n", ["key: value"]),
    ],
    ids=["unknown key", "wrong type", "duplicate key", "broken YAML", "a list"],
)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    error = refused(capsys, 2, "pretrain", "--config", str(path))
    for part in named:
        assert part in error


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refused(capsys, 2, "pretrain", "--config", str(tmp_path / "nowhere.yaml"))


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean pretrain?" in refused(capsys, 2, "pretain")


def test_data_mistakes(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No path, a missing file, a cut file and ids beyond the vocabulary are reported before any training."""
    path = str(config_file(tmp_path, corpus))
    assert "data.path" in refused(capsys, 2, "pretrain", "--config", path, "--data.path", "[]")
    error = refused(capsys, 3, "pretrain", "--config", path, "--data.path", f"[{tmp_path}/absent_text_document]")
    assert "absent_text_document" in error
    error = refused(capsys, 3, "pretrain", "--config", path, "--model.vocab_size", "60")
    assert "model.vocab_size" in error
    assert "60" in error
    cut = write_corpus(tmp_path / "cut_text_document")
    content = Path(f"{cut}.bin").read_bytes()
    Path(f"{cut}.bin").write_bytes(content[: len(content) // 2])
    assert "cut_text_document.bin" in refused(capsys, 3, "pretrain", "--config", path, "--data.path", f"[{cut}]")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_run_folders(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no run, a run with other settings, a rerun of the resolved config, and --fresh."""
    path = str(config_file(tmp_path, corpus))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("irreplaceable")
    assert "foreign" in refused(capsys, 2, "pretrain", "--config", path, "--run_dir", str(foreign))
    assert sorted(entry.name for entry in foreign.iterdir()) in (["thesis.tex"], ["lock", "thesis.tex"])

    assert main(["pretrain", "--config", path]) == 0
    assert "done: 2 of 2 steps" in capsys.readouterr().out
    error = refused(capsys, 4, "pretrain", "--config", path, "--optimizer.lr", "0.5", "--model.hidden_size", "64")
    assert "optimizer.lr: 0.001, now 0.5" in error
    assert "model.hidden_size" in error

    saved = tmp_path / "run" / "config.yaml"
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(saved), "--run_dir", str(again)]) == 0
    first, second = (
        json.loads((folder / "checkpoints" / "step_0000002" / "manifest.json").read_text())["state_fingerprint"]
        for folder in (tmp_path / "run", again)
    )
    assert first == second

    part = ["pretrain", "--config", path, "--run_dir", str(tmp_path / "part")]
    stopped = "nothing to do: step 1 is done and train.stop_after (--max-steps) is 1; give a larger one"
    finished = "nothing to do: the run is finished, all 2 steps are done"
    # Started again at or behind its end, a run reports that, and what is done: not the smaller number that was asked for.
    for limit, done, expected in ((1, 1, ""), (1, 1, stopped), (2, 2, ""), (1, 2, finished), (2, 2, finished)):
        assert main([*part, "--max-steps", str(limit)]) == 0
        shown = capsys.readouterr()
        assert f"done: {done} of 2 steps" in shown.out
        assert expected in shown.err
        assert ("nothing to do" in shown.err) == bool(expected)

    assert main(["pretrain", "--config", path, "--optimizer.lr", "0.5", "--fresh"]) == 0
    assert (tmp_path / "run.old-1" / "checkpoints" / "step_0000002").is_dir()


def test_two_writers(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, corpus)
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom megatron_lion.runs.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        error = refused(capsys, 7, "pretrain", "--config", str(path))
        assert f"pid {process.pid}" in error
    finally:
        process.kill()
        process.wait()


def test_dry_run_writes_nothing(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, corpus)
    assert main(["pretrain", "--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "samples a micro-batch", "tokens", "memory", "FLOP"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_dry_run_opens_the_data(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(config_file(tmp_path, corpus))
    missing = refused(capsys, 3, "pretrain", "--config", path, "--data.path", "[nowhere]", "--dry-run")
    assert "data.path: there is neither a folder nowhere nor nowhere.idx" in missing
    assert "model.kind is bert" in refused(capsys, 3, "pretrain", "--config", path, "--model.kind", "bert", "--dry-run")


def test_dry_run_without_a_driver_needs_no_torch(tmp_path: Path, corpus: str) -> None:
    code = (
        "import sys\n"
        "from megatron_lion.cli import main\n"
        "from megatron_lion.train import dryrun\n"
        "dryrun.DRIVER_FILES = ()\n"
        f"code = main(['pretrain', '--config', {str(config_file(tmp_path, corpus))!r}, '--device', 'auto', '--dry-run'])\n"
        "sys.exit(code or 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton" not in done.stdout


def test_dry_run_reports_the_kernel_where_it_would_be_used(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from megatron_lion.optim import triton_check
    from megatron_lion.train import dryrun

    def kernel_lines(*words: str) -> list[str]:
        path = str(config_file(tmp_path, corpus))
        assert main(["pretrain", "--config", path, "--device", "auto", *words, "--dry-run"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernel")]

    monkeypatch.setattr(dryrun, "DRIVER_FILES", ("/no/such/file", __file__))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_check, "why_no_triton", lambda: None)
    assert kernel_lines() in (["kernel       Triton: interpreted"], ["kernel       Triton: compiled"])
    monkeypatch.setattr(triton_check, "why_no_triton", lambda: "no C compiler")
    assert kernel_lines() == ["kernel       Triton: not available: no C compiler; LION uses its slower foreach path"]
    assert kernel_lines("--optimizer.name", "adamw") == []
    assert kernel_lines("--device", "cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_lines() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dryrun, "DRIVER_FILES", ("/no/such/file",))
    assert kernel_lines() == []


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each loads, passes the checks and a round trip, and its first three lines give purpose, expectation and cost."""
    config = load_config(path)
    assert isinstance(config, RunConfig)
    assert yaml.safe_load(dump_config(config))["name"]
    first = path.read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in first)
    assert first[1].startswith("# Expected")
    assert first[2].startswith("# Cost")
    assert main(["pretrain", "--config", str(path), "--dry-run"]) == 0


def test_paper_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("gpt2_small", "124,475,904"), ("gpt2_medium", "354,871,296")):
        assert main(["pretrain", "--config", str(REPO / "configs" / f"{name}.yaml"), "--dry-run"]) == 0
        assert count in capsys.readouterr().out


def test_print_config(tmp_path: Path, corpus: str) -> None:
    """`--print_config` prints a file that --config reads unchanged."""
    path = config_file(tmp_path, corpus)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lion", "pretrain", "--config", str(path), "--optimizer.lr", "2e-5", "--print_config"],
        capture_output=True, text=True, cwd=REPO, check=False, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert load_config(printed).optimizer.lr == 2e-5
    assert load_config(printed).model.vocab_size == VOCAB
