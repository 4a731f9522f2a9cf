"""Commands in documentation, comments, help texts and messages are accepted by the parsers of their verbs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from documented import REPO, commands_of, problems, sources

from megatron_lion.cli import VERBS, main


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def test_every_documented_command_is_accepted() -> None:
    commands = [command for path in sources() for command in commands_of(path)]
    assert len(commands) > 200, "the search finds too few"
    assert sum(command.whole for command in commands) > 60
    found = [f"{command.place}: {command.text}\n    {problem}" for command in commands for problem in problems(command)]
    assert not found, "\n" + "\n".join(found)


def test_every_command_in_the_help_is_accepted(tmp_path: Path) -> None:
    """The help as printed: texts of the package, and the defaults and types that are inserted."""
    for verb in VERBS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            main([verb, "--help"])
        page = tmp_path / f"{verb}.md"
        page.write_text(" ".join(text.getvalue().split()))  # as one line of prose, since help is wrapped
        found = [f"{command.text}: {problem}" for command in commands_of(page) for problem in problems(command)]
        assert not found, verb


def found_in(folder: Path, name: str, text: str) -> list[str]:
    path = folder / name
    path.write_text(text)
    return [f"{command.place}: {problem}" for command in commands_of(path) for problem in problems(command)]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("    megatron-lion pretrain --config configs/demo.yaml --data.paths '[x]'", 1, "--data.paths: there is no such flag"),
        ("    megatron-lion pretrain --config configs/demo.yaml --data.path [x]", 1, "[x] must be quoted"),
        ("    megatron-lion pretrain --config configs/gone.yaml", 1, "configs/gone.yaml: there is no such file"),
        ("    megatron-lion pretrain --config run.yaml --train.steps many", 1, "train.steps: expected int, given many"),
        ("    megatron-lion evaluate", 1, "missing: TARGET"),
        ("one\n\n    megatron-lion compare RUN it's", 3, "the shell cannot split it"),
        ("text `megatron-lion train --fast` text", 1, "train: there is no such verb"),
        ("```sh\nmegatron-lion demo \\\n  --fast\n```", 2, "--fast: there is no such flag"),
        ("    python -m megatron_lion.launcher --procs 2 pretrain --config configs/demo.yaml", 1, "the launcher does not accept it"),
        ("    python -m megatron_lion.launcher --processes N pretrain --fast", 1, "--fast: there is no such flag"),
        ("    launch/torchrun.sh configs/gone.yaml", 1, "configs/gone.yaml: there is no such file"),
        ("    launch/torchrun.sh configs/demo.yaml --fast", 1, "--fast: there is no such flag"),
        ("    bash launch/gone.sh; python benchmarks/gone.py", 1, None),
        ("`python benchmarks/gone.py`", 1, "benchmarks/gone.py: there is no such file"),
        ("    python benchmarks/train_step.py --fast", 1, "--fast: there is no such flag"),
        ("`make everything`", 1, "make everything: there is no such target"),
        ("`make demo SPEED=1`", 1, "SPEED: the Makefile reads no such variable"),
        ('    RUN="megatron-lion pretrain --config configs/demo.yaml"', 1, "zsh does not divide"),
        ("    run() { megatron-lion pretrain --config configs/demo.yaml --fast \"$@\"; }", 1, "--fast: there is no such flag"),
        ("megatron-lion train is prose, and so is make it", 1, None),
        ("`megatron-lion probe RUN [--steps N,N] …`, `megatron-lion prepare`, `megatron-lion --version`", 1, None),
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(tmp_path: Path, text: str, line: int, problem: str | None) -> None:
    found = found_in(tmp_path, "page.md", text)
    if problem is None:
        assert not found
        return
    assert len(found) == 1
    assert found[0].startswith(f"page.md:{line}: ")
    assert problem in found[0]


def test_wrong_commands_in_code_and_scripts_are_found(tmp_path: Path) -> None:
    module = 'x = 1\ny = f"again: megatron-lion prepare --input {x} --fast; or not"\n"""Text.\n\n    megatron-lion demo --slow\n"""\n'
    assert [line.split(":")[1] for line in found_in(tmp_path, "module.py", module)] == ["2", "5"]
    script = "#!/bin/sh\n#   launch/torchrun.sh configs/demo.yaml --fast\necho \"next: megatron-lion demo --slow '[$X]'\" >&2\n"
    assert [line.split(":")[1] for line in found_in(tmp_path, "script.sh", script)][:2] == ["2", "3"]
    config = "# Cost: minutes on two cores: python -m megatron_lion.launcher --processes 2 pretrain --config configs/gone.yaml\n"
    assert "there is no such file" in found_in(tmp_path, "config.yaml", config)[0]
