"""The next command that a verb prints: for a person at a terminal, ready to paste."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import main, parse
from megatron_lion.commands.verbs import build_parser, verb_module
from megatron_lion.config import RunConfig
from megatron_lion.streams import next_steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_commands_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["printf", "%s|", "a run's folder", "[data/own text]", "$HOME", "x;y"]
    monkeypatch.setattr(sys, "stderr", Terminal())
    next_steps(words, "open file:///tmp/x in a browser")
    first, second = sys.stderr.getvalue().splitlines()
    assert first.startswith("next: printf ")
    assert second == " or:  open file:///tmp/x in a browser"
    assert shlex.split(first.removeprefix("next: ")) == words
    done = subprocess.run(["bash", "-c", first.removeprefix("next: ")], capture_output=True, text=True, check=True)
    assert done.stdout == "a run's folder|[data/own text]|$HOME|x;y|"


def test_without_a_terminal_there_is_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    next_steps(["megatron-lion", "env"])
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)
    next_steps(["megatron-lion", "env"])


def test_compare_ends_with_its_report_and_leaves_stdout_to_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a run")
    words = ["compare", str(run), "--output", str(tmp_path / "out folder"), "--no-figures", "--format", "csv"]
    assert main(words) == 0
    quiet = capsys.readouterr()
    assert "next:" not in quiet.err + quiet.out
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(words) == 0
    last = sys.stderr.getvalue().splitlines()[-1]
    assert last == f"next: open {(tmp_path / 'out folder' / 'report.html').as_uri()} in a browser"
    assert capsys.readouterr().out == quiet.out


def test_theory_and_toy_end_with_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, toy = write_run(tmp_path / "a run"), tmp_path / "toy"
    small = ["--steps", "20", "--starts", "1", "--repeats", "1", "--output", str(toy)]
    for words, expected in ((["theory", str(run)], "compare"), (["toy", *small], "reproduce")):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert main(words) == 0
        program, verb, *others = shlex.split(sys.stderr.getvalue().rpartition("next: ")[2])
        assert (program, verb) == ("megatron-lion", expected)
        parse(build_parser(verb, verb_module(verb)), others)
        assert "next: " not in capsys.readouterr().out
    written = sys.stderr.getvalue().partition("written: ")[2].splitlines()[0].split(", ")
    assert {toy / name for name in written} == set(toy.iterdir())


def test_a_new_command_follows_prepare_and_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed by the verb that it names."""
    data, run = tmp_path / "my data", tmp_path / "my run"
    text = tmp_path / "book.txt"
    text.write_text("".join(f"Line {number} of some text. " for number in range(3000)))
    assert (
        main(["tokenizer", "train", "--input", str(text), "--vocab-size", "258", "--output", str(tmp_path / "tok")])
        == 0
    )
    monkeypatch.setattr(sys, "stderr", Terminal())
    words = ["--input", str(text), "--tokenizer", str(tmp_path / "tok"), "--output", str(data), "--workers", "1"]
    assert main(["prepare", *words]) == 0
    program, *command = shlex.split(sys.stderr.getvalue().rpartition("next: ")[2])  # behind the progress bar's codes
    assert program == "megatron-lion"
    assert command == ["pretrain", "gpt2-tiny", "--data.path", str(data), "--dry-run"]
    assert main(command) == 0

    def trained(config: RunConfig, **others: object) -> None:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr("megatron_lion.train.loop.pretrain", trained)
    monkeypatch.setattr("megatron_lion.runs.steps.list_steps", lambda folder: [20])
    for steps, hinted in (("20", True), ("30", False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        flags = ["--run_dir", str(run), "--train.steps", steps, "--schedule.warmup_steps", "2"]
        assert main(["pretrain", "gpt2-tiny", "--data.path", str(data), *flags]) == 0
        lines = [re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", line) for line in sys.stderr.getvalue().splitlines()]
        hints = [shlex.split(line.partition(": ")[2]) for line in lines if line.startswith(("next: ", " or: "))]
        assert bool(hints) == hinted
        for _, verb, *others in hints:
            namespace = parse(build_parser(verb, verb_module(verb)), others)
            assert str(run) in (getattr(namespace, "target", None), *getattr(namespace, "runs", []))
