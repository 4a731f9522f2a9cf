"""The sdist and the wheel that is built from it: their files, top-level names, and page on a package index."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from megatron_lion.errors import EnvironmentFault
from megatron_lion.shipped import shipped_folder

REPO = Path(__file__).resolve().parent.parent


def build(what: str, source: Path, output: Path) -> Path:
    """Builds the "sdist" or the "wheel" of a source folder; without isolation, because the network may be absent."""
    code = f"from setuptools.build_meta import build_{what}; print(build_{what}({str(output)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    # From a copy, because setuptools leaves files behind.
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        path, copy = REPO / name, folder / "source" / name
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (folder / "dist").mkdir()
    with tarfile.open(build("sdist", folder / "source", folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")  # the one that was built a moment before
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as `python -m build` does, and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist, folder)) as wheel:
        wheel.extractall(folder / "site")  # noqa: S202 - not a tar file, and made a moment before
    return folder / "site"


@pytest.fixture(scope="module")
def facts(installed: Path) -> Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text(encoding="utf-8"))


def test_sdist_holds_what_a_user_of_it_needs(sdist: Path) -> None:
    """Everything of the package, and what the tests and `make setup` read; links in its README work in it."""
    for folder in ("megatron_lion", "configs", "launch", "data_prep", "docs", "tests"):
        names = {path.relative_to(REPO) for path in (REPO / folder).rglob("*") if path.is_file()}
        names = {name for name in names if "__pycache__" not in name.parts}
        there = {path.relative_to(sdist) for path in (sdist / folder).rglob("*") if path.is_file()}
        assert names <= there, sorted(map(str, names - there))
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "Makefile", "constraints.txt"):
        assert (sdist / name).read_bytes() == (REPO / name).read_bytes()
    assert not list(sdist.rglob("*.pyc"))


def test_wheel_holds_configs_and_launchers(installed: Path) -> None:
    for name in ("configs", "launch"):
        files = {path.name: path.read_bytes() for path in (REPO / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (installed / "megatron_lion" / name).iterdir()} == files
    assert (installed / "megatron_lion" / "launch" / "torchrun.sh").stat().st_size > 1000
    for name in ("lion.cpp", "bit_sum.cpp"):
        assert (installed / "megatron_lion" / "optim" / name).is_file()


def test_wheel_claims_one_top_level_name(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"megatron_lion"}


def test_installed_package_finds_its_configs(installed: Path) -> None:
    code = "from megatron_lion.shipped import shipped_folder; print(shipped_folder('configs'))"
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=installed, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == installed / "megatron_lion" / "configs"


def test_checkout_uses_its_own_folder_and_absence_is_reported(tmp_path: Path) -> None:
    assert shipped_folder("launch") == REPO / "launch"
    with pytest.raises(EnvironmentFault, match="installed without its configs/ folder"):
        shipped_folder("configs", tmp_path / "megatron_lion")


def test_metadata(facts: Message, installed: Path) -> None:
    assert facts["License-Expression"] == "Apache-2.0"
    classifiers = facts.get_all("Classifier") or []
    # A licence classifier beside a licence expression is refused by indexes.
    assert not [text for text in classifiers if text.startswith("License")]
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(classifiers)
    assert "Programming Language :: Python :: 3.12" in classifiers
    urls = [text.partition(", ")[2] for text in facts.get_all("Project-URL") or []]
    assert "https://arxiv.org/abs/2411.07724" in urls
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "megatron-lion = megatron_lion.__main__:start" in scripts.read_text()


def targets(markdown: str) -> list[str]:
    """Where the links and images of a Markdown text lead."""
    found = []
    for block in MarkdownIt("commonmark").parse(markdown):
        for token in block.children or []:
            found += [str(value) for name, value in token.attrs.items() if name in ("href", "src")]
    return found


def test_the_index_page_has_no_link_into_the_checkout(facts: Message) -> None:
    page = str(facts.get_payload())
    assert facts["Description-Content-Type"].startswith("text/markdown")
    assert len(page) > 3000
    relative = [target for target in targets(page) if not target.startswith(("https://", "http://", "mailto:"))]
    assert not relative
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert any(not target.startswith("http") for target in targets(readme)), (
        "the README has no such link; nothing is tested"
    )


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("lion_setup", REPO / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "plain", "absolute"),
    [
        ("see [data](docs/data.md).", "see data.", "see [data](https://x.org/r/blob/main/docs/data.md)."),
        ("[a](https://a.org) [b](mailto:b)", None, None),
        ("`[a](docs/a.md)`\n\n    [b](docs/b.md)\n\n```\n[c](docs/c.md)\n```\n", None, None),
        ("![a figure](docs/a.png)", "*a figure*", "*a figure*"),
        ("![](docs/a.png)", "", ""),
        ("[![badge](https://b.org/b.svg)](https://b.org)", None, None),
        ('<img alt="a figure" src="docs/a.png" width="500">', "a figure", "a figure"),
        ("[here](#limits)", "here", "[here](https://x.org/r/blob/main/#limits)"),
    ],
)
def test_long_description(script: Any, text: str, plain: str | None, absolute: str | None) -> None:
    assert script.long_description(text) == (text if plain is None else plain)
    assert script.long_description(text, "https://x.org/r/") == (text if absolute is None else absolute)
