"""The word check finds rejected words in comments, docstrings and messages, and ignores names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("words", REPO / ".ci" / "words.py")
assert SPEC is not None
assert SPEC.loader is not None
words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(words)


def found(tmp_path: Path, text: str, name: str = "sample.py") -> list[tuple[int, str]]:
    path = tmp_path / name
    path.write_text(text)
    result: list[tuple[int, str]] = words.findings(path)
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# It tells why.\n", [(1, "tells")]),
        ('def f():\n    """Returns it.\n\n    Told once."""\n', [(4, "Told")]),
        ('message = "mend it"\n', [(1, "mend")]),
        ('message = f"{number} will heed {number}"\n', [(1, "heed")]),
        ("x = 1  # built anew\n", [(1, "anew")]),
        ('"""The reason, None where there is one."""\n', [(1, "None where")]),
        ("# The reason, None\n# where there is none.\n", [(1, "None where")]),
        ("x = 1\n# so\n# that only one waits\n", [(2, "so that only")]),
        ("# tells\n\n# told\nx = 1\n", [(1, "tells"), (3, "told")]),
    ],
)
def test_texts_are_searched(tmp_path: Path, text: str, expected: list[tuple[int, str]]) -> None:
    assert found(tmp_path, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "told = tells(heed.mend)\n",
        "# It foretells; untold, recommend, mended, anewer, heedless.\n",
        "# The value is None.\n\nwhere = 3\n",
        '"""so that the only one"""\n',
        "f'{told}'\n",
    ],
)
def test_names_and_other_words_are_not(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, text) == []


def test_a_shell_script_is_searched_as_a_whole(tmp_path: Path) -> None:
    text = "#!/bin/sh\n# tells\necho 'you are told'\n"
    assert found(tmp_path, text, "script") == [(2, "tells"), (3, "told")]


def test_exit_code_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("\n# told\n")
    good.write_text("# reported\n")
    assert words.main([str(good)]) == 0
    assert words.main([str(good), str(bad)]) == 1
    assert capsys.readouterr().out.startswith(f"{bad}:2: 'told'")


def test_all_code_and_every_page_is_read_by_default() -> None:
    names = {path.relative_to(REPO).as_posix() for path in words.sources()}
    assert {"megatron_lion/cli.py", "data_prep/openwebtext.sh", "benchmarks/gpu.py", "tests/conftest.py"} <= names
    assert {"launch/torchrun.sh", "launch/slurm.sbatch", ".ci/run"} <= names
    assert {"README.md", "docs/theory.md", "docs/how-to/multi-node.md", "configs/gpt2_tiny.yaml"} <= names
    assert not {
        name for name in names if name.endswith((".json", ".pyc", ".png")) or name.startswith("benchmarks/results/")
    }
