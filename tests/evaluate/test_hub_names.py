"""A hub name in place of a model folder gets the command that downloads it, and uses no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_lion.cli import main


@pytest.mark.parametrize("verb", ["evaluate", "generate", "import"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hf:gpt2", "hf download gpt2 --local-dir gpt2"),
        ("hf:owner/name", "hf download owner/name --local-dir name"),
    ],
)
def test_a_model_is_not_downloaded(
    verb: str,
    name: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a text")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert main([verb, name, *(["--text", "x.txt"] if verb == "evaluate" else [])]) == 4
    assert capsys.readouterr().err == (
        f"megatron-lion: {name}: models are not downloaded; run `{command}`, then give {command.rpartition(' ')[2]}\n"
    )


def test_other_missing_folders_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "nowhere"]) == 4
    assert capsys.readouterr().err == "megatron-lion: nowhere: no such folder; give a Hugging Face model folder\n"
