"""`configs` lists, prints and copies the shipped configs, and never replaces a file without --overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_lion.cli import main
from megatron_lion.configfile import load_config
from megatron_lion.errors import ConfigError, StorageError
from megatron_lion.shipped import config_file

REPO = Path(__file__).resolve().parents[2]
FILES = sorted((REPO / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", [[], ["list"]])
def test_list(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", *words]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert len(blocks) == len(FILES) + 1
    for path, block in zip(FILES, blocks, strict=False):
        name, purpose, shown = block.strip().splitlines()
        assert name == path.stem.replace("_", "-")
        assert purpose.strip() == path.read_text().splitlines()[0].removeprefix("# ")
        assert shown.strip() == str(path)
        assert config_file(name) == path, "the name in the list must be one that --config accepts"


@pytest.mark.parametrize("name", ["gpt2-tiny", "gpt2_tiny", "gpt2_tiny.yaml"])
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "show", name]) == 0
    assert capsys.readouterr().out == (REPO / "configs" / "gpt2_tiny.yaml").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_copy_has_the_same_settings(path: Path, tmp_path: Path) -> None:
    assert main(["configs", "copy", path.stem]) == 0
    copied = tmp_path / path.name
    assert yaml.safe_load(copied.read_text()) == yaml.safe_load(path.read_text())
    assert load_config(copied) == load_config(path)
    # An editor looks for a relative schema beside the copy, where there is none.
    changed = [line for line in copied.read_text().splitlines() if line not in path.read_text().splitlines()]
    assert changed == [f"# yaml-language-server: $schema={REPO / 'configs' / 'schema.json'}"]


@pytest.mark.parametrize(
    ("dest", "made"), [("mine.yaml", "mine.yaml"), ("there", "there/demo.yaml"), ("new/", "new/demo.yaml"), ("a/b.yaml", "a/b.yaml")]
)  # fmt: skip
def test_dest(dest: str, made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert main(["configs", "copy", "demo", dest]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [made]
    assert f"megatron-lion pretrain --config {made}" in capsys.readouterr().out


def test_a_file_is_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "demo.yaml"
    mine.write_text("mine")
    assert main(["configs", "copy", "demo"]) == ConfigError.exit_code
    assert mine.read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert main(["configs", "copy", "demo", "--overwrite"]) == 0
    assert load_config(mine) == load_config(REPO / "configs" / "demo.yaml")
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nothing")
    assert main(["configs", "copy", "demo", "link.yaml"]) == ConfigError.exit_code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.yaml", "link.yaml"], "a temporary file is left"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["show", "gpt-tiny"], "'gpt-tiny'; did you mean gpt2-tiny? (names: bert-base,"),
        (["show"], "a name is missing; `megatron-lion configs` lists"),
        (["list", "demo"], "megatron-lion configs show demo"),
        (["show", "demo", "x.yaml"], "megatron-lion configs copy demo x.yaml"),
        (["show", "demo", "--overwrite"], "--overwrite has no effect with configs show"),
        (["demo"], "expected one of 'list', 'show', 'copy', given demo"),
        (["copy", "a", "b", "c"], "unexpected word: c"),
    ],
)
def test_mistakes_give_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["configs", *words]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert text in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["configs", "copy", "demo", "file/x.yaml"]) == StorageError.exit_code
    assert "file" in capsys.readouterr().err
