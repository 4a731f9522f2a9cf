"""A transformers that is too old or cannot be imported is reported as such, and not as a damaged model folder."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers
from gpt2_folders import write_gpt2

from megatron_lion.cli import main
from megatron_lion.errors import CheckpointError, EnvironmentFault
from megatron_lion.evaluate.hf_errors import importing_transformers, refusal

UNKNOWN_KEYWORD = TypeError("GPT2LMHeadModel.__init__() got an unexpected keyword argument 'dtype'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["the cat and the dog"]
    return write_gpt2(
        tmp_path_factory.mktemp("gpt2"), texts, tokens=300, n_layer=1, n_embd=16, n_head=2, n_positions=16
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("the dog and the cat")
    return str(tmp_path / "text.txt")


def raising(error: Exception) -> Any:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise error

    return from_pretrained


@pytest.fixture
def old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of an installation with transformers 4.50.0, and the exception that its from_pretrained raises."""
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.50.0" if name == "transformers" else version(name))
    monkeypatch.setattr(metadata, "requires", lambda _: ["rich>=13", "transformers>=4.56"])
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", raising(UNKNOWN_KEYWORD))


@pytest.mark.usefixtures("old_transformers")
def test_evaluate_names_a_version_that_is_too_old(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--text", text]) == EnvironmentFault.exit_code
    error = capsys.readouterr().err
    assert "transformers 4.50.0, needs >=4.56" in error
    assert "unexpected keyword argument 'dtype'" in error
    assert f"run {sys.executable} -m pip install 'transformers>=4.56'" in error
    assert "not a GPT-2 model" not in error


@pytest.mark.usefixtures("old_transformers")
def test_import_names_a_version_that_is_too_old(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(folder), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(words) == EnvironmentFault.exit_code
    assert "transformers 4.50.0, needs >=4.56" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_settings_class_that_is_too_old(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["transformers>=900"])
    usual = transformers.GPT2Config.__init__

    def init(self: Any, *others: Any, **named: Any) -> None:
        if "n_layer" in named:
            raise TypeError("unexpected keyword argument")
        usual(self, *others, **named)

    monkeypatch.setattr(transformers.GPT2Config, "__init__", init)
    assert main(["import", str(folder), "--run_dir", str(tmp_path / "run")]) == EnvironmentFault.exit_code


def test_a_missing_package_is_not_the_folder_s_fault(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ImportError("Using `bitsandbytes` quantization requires it:\n pip install bitsandbytes")
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", raising(error))
    assert main(["evaluate", str(folder), "--text", text]) == EnvironmentFault.exit_code
    line = capsys.readouterr().err
    assert f"transformers {transformers.__version__} failed: ImportError: Using `bitsandbytes`" in line
    assert "pip install bitsandbytes" in line


def test_a_damaged_folder_stays_the_folder_s_fault(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", raising(UNKNOWN_KEYWORD))
    assert main(["evaluate", str(folder), "--text", text]) == CheckpointError.exit_code
    assert "not a GPT-2 model that transformers can load: TypeError: GPT2LMHeadModel" in capsys.readouterr().err


def test_too_little_memory_is_no_damage() -> None:
    with pytest.raises(MemoryError):
        refusal(MemoryError("no memory"), "the folder is damaged")


@pytest.mark.parametrize("error", [ImportError("tokenizers>=0.22 is required"), RuntimeError("Failed to import gpt2")])
def test_an_import_that_fails(error: Exception) -> None:
    with pytest.raises(EnvironmentFault, match=str(error)), importing_transformers():
        raise error
