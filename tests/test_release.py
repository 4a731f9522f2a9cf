"""The version is the same in every file that states it, and the changelog describes it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import megatron_lion

REPO = Path(__file__).resolve().parent.parent


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    released = re.search(r"^## \[(\d[^\]]*)\] - (\d{4}-\d\d-\d\d)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert {version, megatron_lion.__version__, str(citation["version"]), released[1]} == {version}
    assert str(citation["date-released"]) == released[2]
