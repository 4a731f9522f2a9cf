"""What a newcomer types first: each mistake is answered with what to type, before anything is imported or written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion import streams
from megatron_lion.cli import main, usage
from megatron_lion.commands import watch
from megatron_lion.commands.verbs import VERBS
from megatron_lion.streams import NO_HINTS, next_steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("A first line: of a book\nand a second: one\n  - more\n")
    Path("one line.txt").write_text("A book of one line.")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("pretrain", "data.path: no dataset given; `megatron-lion pretrain --text FILE` trains on a text"),
        ("pretrain book.txt", "book.txt: is no config; `megatron-lion pretrain --text book.txt` trains on a text"),
        ("pretrain|one line.txt", "`megatron-lion pretrain --text 'one line.txt'` trains on a text"),
        ("pretrain --data.path book.txt", "or train on the text itself with --text book.txt"),
        ("pretrain --optimizer adamw", "(did you mean --optimizer.name adamw?)"),
        ("pretrain --model gpt2", "(did you mean --model.kind gpt2?)"),
        ("pretrain --optimizer.name Lion", "(did you mean lion?)"),
        ("pretrain|--optimizer.betas|(0.9, 0.99)", "; write --optimizer.betas '[0.9, 0.99]'"),
        ("pretrain --optimizer.betas 0.9,0.99", "; write --optimizer.betas '[0.9, 0.99]'"),
        ("pretrain --epochs 3", "--epochs (did you mean --train.steps?)"),
        ("generate run --max_length 9", "--max_length (did you mean --max-new-tokens?)"),
        ("generate", "missing: TARGET; --help explains it"),
        ("export run", "missing: --output; --help explains it"),
        ("prepare book.txt", "unexpected word: book.txt; inputs are given as --input book.txt"),
        ("report", "no verb 'report'; did you mean compare?"),
        ("train", "no verb 'train'; did you mean pretrain?"),
    ],
)
def test_the_answer_can_be_typed(line: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.split("|") if "|" in line else line.split()
    assert main(words) in (2, 3)
    shown = capsys.readouterr().err
    assert answer in shown, shown
    assert shown.count("\n") == 1
    assert not Path("runs").exists()


def test_a_training_without_data_is_refused_without_torch() -> None:
    code = (
        "import sys\nfrom megatron_lion.cli import main\n"
        "assert main(['pretrain']) == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_missing_text_is_reported_before_torch_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_lion.commands import evaluate

    monkeypatch.setattr(evaluate, "load", lambda *modules, shown: pytest.fail("torch is loaded first"))
    run = write_run(Path("run"))
    for words in (
        ["--text", "no.txt"],
        ["--text", "book.txt", "run"],
        ["--lambada", "no.txt"],
        ["--wikitext103", "no.txt"],
    ):
        assert main(["evaluate", str(run), *words]) == 3
        assert "no.txt: no such text file" in (shown := capsys.readouterr().err) or "run: a folder was given" in shown


def test_settings_that_the_optimizer_does_not_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optimizer.eps", "0.5", "--optimizer.momentum", "0.5", "--optimizer.lr", "1e-4"]
    assert main(["pretrain", "gpt2-tiny", *flags, "--dry-run"]) == 0
    assert "note: optimizer.momentum and optimizer.eps have no effect with lion\n" in capsys.readouterr().err
    assert main(["pretrain", "gpt2-tiny", "--optimizer.name", "adamw", "--optimizer.eps", "1e-6", "--dry-run"]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_a_preview_refuses_what_the_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of a run are fixed; for a longer one the message names the way."""
    run = write_run(Path("run"))
    (run / "config.yaml").write_text("train:\n  steps: 500\n")
    before = sorted(run.rglob("*"))
    assert main(["pretrain", "--run_dir", "run", "--train.steps", "600", "--dry-run"]) == 4
    shown = capsys.readouterr().err
    assert "train.steps: 500, now 600" in shown
    assert "to train its weights for longer, export the run and import the export into another run_dir" in shown
    assert main(["pretrain", "--run_dir", "run", "--train.steps", "500", "--seed", "5", "--dry-run"]) == 4
    assert "for longer" not in capsys.readouterr().err
    assert main(["pretrain", "--run_dir", "run", "--train.steps", "600", "--dry-run", "--fresh"]) == 0
    assert sorted(run.rglob("*")) == before


def test_watch_names_a_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server:
        server_address = ("127.0.0.1", 8)

        def serve_forever(self) -> None:
            raise KeyboardInterrupt

        def server_close(self) -> None:
            pass

    monkeypatch.setattr(watch, "make_server", lambda *words: Server())
    write_run(Path("run"))
    assert main(["watch", "run", "gone"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: gone does not exist yet; the page waits for it"]


def test_the_overview_fits_80_columns() -> None:
    lines = usage().splitlines()
    assert max(map(len, lines)) < 80
    for verb, text in VERBS.items():
        (line,) = [line for line in lines if line.startswith(f"  {verb} ")]
        assert line.split()[1] == text.split()[0]


def test_a_verb_of_another_verb_gives_no_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows in the demo is up to the demo; `Jobs.run` sets the variable."""
    from megatron_lion.jobs import Jobs

    monkeypatch.setattr(streams, "stderr_is_terminal", lambda: True)
    next_steps(["megatron-lion", "env"])
    assert "next: " in capsys.readouterr().err
    monkeypatch.setenv(NO_HINTS, "1")
    next_steps(["megatron-lion", "env"])
    assert capsys.readouterr().err == ""
    monkeypatch.delenv(NO_HINTS)
    with Jobs() as jobs:
        code = f"import os, sys; sys.exit(0 if os.environ.get({NO_HINTS!r}) else 3)"
        assert jobs.run_command([sys.executable, "-c", code]) == 0
