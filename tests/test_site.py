"""The documentation site, built as `make docs` does: links, anchors, what a second Markdown parser finds, and no other host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

REPO = Path(__file__).resolve().parent.parent
SOURCES = ("docs", "megatron_lion", "examples", "benchmarks", "configs", "launch", "tests", "data_prep")
COUNTED = ("h1", "h2", "h3", "li", "td", "pre", "img")
pytestmark = pytest.mark.slow


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=folder, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(REPO, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What is in a page: ids, links, files that a browser would load, and tags inside the article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.tags: Counter[str] = Counter()
        self._is_article = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._is_article |= tag == "article"
        self.tags[tag] += self._is_article
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "iframe"):
            self.loaded.append(values.get("src", ""))
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        self._is_article &= tag != "article"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"
    }


def test_every_link_and_anchor_leads_somewhere(pages: dict[Path, Page]) -> None:
    """mkdocs checks its own links; this reads the HTML, so that links which the hook or a plug-in wrote are checked too."""
    broken, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.name}: {link}")
    assert count > 1000
    assert not broken


def test_no_page_loads_a_file_of_another_host(pages: dict[Path, Page]) -> None:
    loaded = [name for page in pages.values() for name in page.loaded if name and not name.startswith("data:")]
    assert len(loaded) > 100
    assert not [name for name in loaded if urlsplit(name).netloc]


def documents() -> Iterator[Path]:
    yield from (path for path in sorted((REPO / "docs").rglob("*.md")) if path.name != "python-api.md")
    yield REPO / "README.md"


def test_pages_have_what_a_second_parser_finds(site: Path, pages: dict[Path, Page]) -> None:
    """Python-Markdown reads lists, tables and code differently from GitHub if blank lines or spaces are missing."""
    parser = MarkdownIt("commonmark").enable("table")
    different = {}
    for path in documents():
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if "https://img.shields.io" not in line)  # badges: the site has none
        expected = Page(f"<article>{parser.render(text)}").tags
        place = (
            "index.html"
            if path.name == "README.md"
            else path.relative_to(REPO / "docs").with_suffix(".html").as_posix()
        )
        found = pages[site / place].tags
        counts = {tag: (expected[tag], found[tag]) for tag in COUNTED if expected[tag] != found[tag]}
        if counts:
            different[place] = counts
    assert not different


def test_the_python_reference_and_the_notebooks_are_there(pages: dict[Path, Page], site: Path) -> None:
    reference = pages[site / "reference" / "python-api.html"]
    names = {"megatron_lion.Lion", "megatron_lion.runs.record.read_run", "megatron_lion.gradient.accumulate.FullGradient",
             "megatron_lion.theory.bounds.theorem2", "megatron_lion.errors.ConfigError"}  # fmt: skip
    assert names <= reference.ids
    for notebook in (REPO / "examples").glob("*.ipynb"):
        page = pages[site / "repository" / "examples" / f"{notebook.stem}.html"]
        assert page.tags["img"] >= 1


def test_a_broken_link_and_a_stale_anchor_fail_the_build(tmp_path: Path) -> None:
    for name in SOURCES:
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in REPO.iterdir():
        if name.is_file() and name.suffix in (".md", ".yml"):
            shutil.copy(name, tmp_path)
    page = tmp_path / "docs" / "faq.md"
    page.write_text(
        page.read_text() + "\n[a](no-such-page.md) [b](theory.md#no-such-heading) [c](../configs/none.yaml)\n"
    )
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for text in ("no-such-page.md", "#no-such-heading", "../configs/none.yaml"):
        assert text in done.stderr
