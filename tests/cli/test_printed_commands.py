"""Every command that demo, reproduce and sweep print is, split by real shells, the command that they run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run
from tiny import tiny_config, write_corpus

from megatron_lion.cli import build_parser, main, parse, verb_module
from megatron_lion.commands import reproduce as reproduce_verb
from megatron_lion.configfile import dump_config
from megatron_lion.data.manifest import read_manifest
from megatron_lion.jobs import Jobs, interpreter_word, shell_line, typed_path
from megatron_lion.prepare.demo_corpus import build_demo_corpus
from megatron_lion.prepare.vocabularies import train_bpe, train_wordpiece
from megatron_lion.reproduce.artefacts import ARTEFACTS, build_plan
from megatron_lion.reproduce.run_verbs import run_plan
from megatron_lion.reproduce.sources import Sources

SHELLS = [shell for shell in ("sh", "bash", "zsh") if shutil.which(shell)]
NASTY = "my [demo], it's ${HOME} & 50% *"
FULL = {"text": ("a.jsonl",), "tokenizer": "gpt2", "vocab": "vocab.txt", "wikitext103": "wiki.test.tokens"}
NOTHING: dict[str, Any] = {"text": (), "tokenizer": None, "vocab": None, "wikitext103": None}


def split(line: str) -> list[str]:
    """The words of a command line, by real shells, which must agree."""
    found = []
    for shell in SHELLS:
        options = ["-f"] if shell == "zsh" else []  # no start files
        done = subprocess.run([shell, *options, "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
        assert done.stderr == b""
        found.append(done.stdout.decode().split("\0")[:-1])
    assert all(words == found[0] for words in found)
    return found[0]


def as_run(line: str) -> list[str]:
    """The words of a printed line, with the interpreter as the path that the shell would start."""
    first, *words = split(line)
    if first == "bash":
        return [first, *words]
    started = shutil.which(first) if "/" not in first else str(Path.cwd() / first)
    return [started or first, *words]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have run; a training leaves a synthetic run."""
    found: list[list[str]] = []

    def run_command(self: Jobs, command: list[str], stdout: Any = None) -> int:
        found.append(command)
        if "pretrain" in command and "--run_dir" in command:
            folder = Path(command[command.index("--run_dir") + 1])
            optimizer = command[command.index("--optimizer.name") + 1]
            if not folder.exists() and folder.parent.name == "runs":
                write_run(folder, optimizer=optimizer, model="gpt2-demo", d=1_071_872)
        return 0

    monkeypatch.setattr(Jobs, "run_command", run_command)
    return found


def printed(text: str) -> list[str]:
    """The command lines in the log of a demo or a reproduction."""
    return [line.removeprefix("    ") for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("folder", ["demo", NASTY])
def test_the_demo_prints_what_it_runs(
    folder: str, processes: int, recorded: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--output", folder, "--processes", str(processes)]) == 0
    shown = capsys.readouterr()
    lines = printed(shown.err)
    assert [as_run(line) for line in lines] == recorded
    verbs = [next(word for word in command if word in ("demo", "tokenizer", "prepare", "pretrain", "evaluate", "generate", "compare"))
             for command in recorded]  # fmt: skip
    assert verbs == ["demo", "tokenizer", "prepare", *["pretrain"] * 3, *["evaluate"] * 3, "generate", "compare"]
    launched = (
        ["-m", "megatron_lion.launcher", "--processes", str(processes)] if processes > 1 else ["-m", "megatron_lion"]
    )
    assert all(
        command[1 : 1 + len(launched)] == launched
        for command, verb in zip(recorded, verbs, strict=True)
        if verb == "pretrain"
    )
    for command, verb in zip(recorded, verbs, strict=True):
        if verb == "pretrain":
            words = command[command.index(verb) + 1 :]
            assert parse(build_parser(verb, verb_module(verb)), words).data.path == [f"{folder}/data"]


def test_the_commands_at_the_end_of_the_demo_are_accepted(
    recorded: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--output", NASTY, "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  ")]
    found = []
    for line in lines:
        interpreter, module, package, verb, *words = as_run(line)
        assert (interpreter, module, package) == (sys.executable, "-m", "megatron_lion")
        namespace = parse(build_parser(verb, verb_module(verb)), words)
        if verb == "sweep":
            assert namespace.data.path == [f"{NASTY}/data"]
        if verb == "pretrain":
            assert namespace.text == ["FILE.txt"]
        found.append(verb)
    assert {"sweep", "pretrain"} <= set(found)


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize("artefact", sorted(ARTEFACTS))
def test_reproduce_prints_what_it_runs(
    artefact: str, scale: Any, recorded: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its log and --print: the same lines, and no others than comments and, at the full scale, the interpreter."""
    monkeypatch.chdir(tmp_path)
    given = FULL if scale == "full" else NOTHING
    flags = [
        word
        for key, value in given.items()
        if value
        for word in (f"--{key}", value if isinstance(value, str) else value[0])
    ]
    assert main(["reproduce", artefact, "--scale", scale, "--output", NASTY, *flags, "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "export "))]
    with Jobs() as jobs:
        run_plan(build_plan(artefact, scale, Sources(**given, output=Path(NASTY))), 2, jobs)
    assert [as_run(line) for line in commands] == recorded
    assert [as_run(line) for line in printed(capsys.readouterr().err)] == recorded
    assert [line for line in lines if line.startswith("export ")] == [f"export PYTHON={sys.executable}"] * (
        scale == "full"
    )


def test_comments_of_printed_commands_are_harmless_in_an_interactive_zsh(capsys: pytest.CaptureFixture[str]) -> None:
    """It executes a pasted comment as a command, so a quote would swallow the next lines."""
    flags = [
        word for key, value in FULL.items() for word in (f"--{key}", value if isinstance(value, str) else value[0])
    ]
    for words in (["--scale", "tiny"], ["--scale", "full", *flags]):
        assert main(["reproduce", *ARTEFACTS, *words, "--print"]) == 0
        comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
        assert len(comments) > 10
        for comment in comments:
            assert re.fullmatch(r"#[#\w ,.:=+%/-]*", comment), comment


def test_a_step_of_several_artefacts_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table-b1", "figure-3", "figure-2", "--print"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(set(lines))
    assert sum(" --only-corpus " in line for line in lines) == 1
    assert sum(" compare " in line for line in lines) == 3


def test_the_script_of_a_sweep_runs_what_the_sweep_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "c_text_document")
    monkeypatch.chdir(tmp_path)
    Path("tiny config.yaml").write_text(dump_config(tiny_config("unused", corpus, train__test_every=2)))
    words = ["sweep", "tiny config.yaml", "--grid", "optimizer.name=lion,sgd", "--grid", "optimizer.lr=1e-3",
             "--grid", "lion:optimizer.betas=[0.9,0.95],[0.9,0.99]", "--output", "a\n[sweep] of 'mine'", "--processes", "2"]  # fmt: skip
    assert main([*words, "--print"]) == 0
    Path("runs.sh").write_text(capsys.readouterr().out)
    Path("python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> words\nprintf "\\n\\0" >> words\nexit 1\n')
    Path("python").chmod(0o755)
    found: list[list[str]] = []

    def run_command(self: Jobs, command: list[str], stdout: Any = None) -> int:
        found.append(command[1:])
        return 1

    monkeypatch.setattr(Jobs, "run_command", run_command)
    main(words)
    assert len(found) == 3
    for shell in SHELLS:
        Path("words").unlink(missing_ok=True)
        subprocess.run([shell, "runs.sh"], check=True, env={**os.environ, "PYTHON": "./python"})
        scripted = Path("words").read_text().split("\n\0")[:-1]
        assert [text.split("\0")[:-1] for text in scripted] == found, shell


def test_a_stopped_demo_names_no_command_that_it_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After Ctrl-C in a training: code 75, and the message that the same command continues."""

    def run_command(self: Jobs, command: list[str], stdout: Any = None) -> int:
        if "pretrain" not in command:
            return 0
        signal.raise_signal(signal.SIGINT)
        return 75

    monkeypatch.setattr(Jobs, "run_command", run_command)
    assert main(["demo", "--output", str(tmp_path / "demo"), "--processes", "1"]) == 75
    assert capsys.readouterr().err.endswith("stopped in `megatron-lion pretrain`; the same command continues there\n")


@pytest.mark.parametrize(
    "words", [["a b", "[x]", "=ls", "$HOME", "it's", "", "{a,b}", "~", "a=~", "*", "!x", "#", "\\n", "é"]]
)
def test_a_line_gives_its_words_in_every_shell(words: Sequence[str]) -> None:
    assert split(shell_line(list(words))) == words
    assert not re.search(r"(?:^| )=", shell_line(list(words))), "zsh, which may not be here, replaces =word"


def test_paths_are_short_inside_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed_path(tmp_path / "configs" / "demo.yaml") == "configs/demo.yaml"
    assert typed_path("/elsewhere/demo.yaml") == "/elsewhere/demo.yaml"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    # Links of two environments lead to the same file, so only the path shows which environment a shell would start.
    monkeypatch.setenv("PATH", str(python.parent))
    assert interpreter_word() != "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert interpreter_word() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    assert interpreter_word() == "bin/python"


def test_the_header_of_the_full_scale_quotes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan("figure-3", "full", Sources(**FULL, output=Path("out")))
    monkeypatch.setattr(sys, "executable", "/my tools/python")

    class Args:
        scale, processes = "full", 8

    assert "export PYTHON='/my tools/python'\n" in reproduce_verb._commands([plan], Args())


def paste(lines: Sequence[str]) -> None:
    for line in lines:
        subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=600)


@pytest.mark.slow
def test_pasted_commands_make_the_sources_of_a_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Corpus, vocabularies and datasets in an empty folder equal those that the package's functions make."""
    corpus = build_demo_corpus(tmp_path / "whole")
    small = build_demo_corpus(tmp_path / "small", max_train_bytes=400_000).train
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["reproduce", "table-b1", "figure-2", "--print"]) == 0
    paste([line for line in capsys.readouterr().out.splitlines() if " --only-corpus " in line])
    for name in ("train.jsonl", "held_out.txt"):
        assert Path("reproduction", "text", name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert corpus.documents > 1000
    # The next commands read a part of it, which is as good and quicker.
    words = ["reproduce", "figure-3", "figure-2", "--text", str(small), "--output", "it's small"]
    assert main([*words, "--print"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r" (tokenizer|prepare) ", line)]
    assert len(lines) == 4
    paste(lines)
    train_bpe([small], 2048, tmp_path / "bpe")
    train_wordpiece([small], 2048, tmp_path / "wordpiece")
    for name in ("bpe/vocab.json", "bpe/merges.txt", "wordpiece/vocab.txt"):
        assert Path("it's small", name).read_bytes() == (tmp_path / name).read_bytes(), name
    for kind, tokenizer in (("gpt2", "bpe"), ("bert", "wordpiece")):
        task = ["--task", "bert"] if kind == "bert" else []
        assert main(["prepare", "--input", str(small), "--tokenizer", str(tmp_path / tokenizer), "--output", str(tmp_path / kind),
                     "--split", "94,3,3", *task]) == 0  # fmt: skip
        assert read_manifest(f"it's small/data-{kind}").splits == read_manifest(tmp_path / kind).splits
    # The plan finds what was pasted, and makes none of it again.
    with Jobs() as jobs:
        ran: list[str] = []
        monkeypatch.setattr(jobs, "run", lambda verb, words, processes=1: ran.append(verb) or 0)
        run_plan(
            build_plan("figure-2", "tiny", Sources(**{**NOTHING, "text": (str(small),)}, output=Path("it's small"))),
            2,
            jobs,
        )
    assert ran == ["prepare", *["pretrain"] * 5, "compare"]
