"""Generated pages are up to date, the tables of metrics cover the code, and links fit the site's places."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_lion import errors
from megatron_lion.model.bert import MaskedAndOrder
from megatron_lion.runs.metric_keys import METRIC_KEYS

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), REPO / "README.md"]


def script(name: str) -> ModuleType:
    """Imports a module of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["update_reference", "site_pages"])
def test_examples_in_the_scripts(name: str) -> None:
    result = doctest.testmod(script(name))
    assert result.attempted > 1
    assert result.failed == 0


def test_the_generated_pages_are_up_to_date_and_a_stale_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = script("update_reference")
    assert reference.main(["--check"]) == 0
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert reference.main([]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"settings.md", "commands.md", "metrics.md"}
    page = tmp_path / "settings.md"
    page.write_text(page.read_text().replace("`optimizer.lr`", "`optimizer.rate`"))
    assert reference.main(["--check"]) == 1
    assert "settings.md is not up to date" in capsys.readouterr().err


def test_the_table_of_metrics_has_each_key_of_the_code_and_no_other() -> None:
    sources = [
        *(REPO / "megatron_lion" / "train").glob("*.py"),
        REPO / "megatron_lion" / "gradient" / "probe_result.py",
    ]
    written = {"step", "time", "valid/loss", "test/loss"}
    for path in sources:
        written |= set(re.findall(r'"((?:train|optim|perf|memory|progress|probe)/[a-z0-9_]+)"', path.read_text()))
    parts = MaskedAndOrder().means(dict.fromkeys(MaskedAndOrder.sum_names, 1.0))
    written |= {f"{split}/{name}" for split in ("train", "valid", "test") for name in parts}
    assert len(written) > 60
    assert {item.key for item in METRIC_KEYS} == written
    assert len(METRIC_KEYS) == len(written), "a key has two rows"


def test_the_page_of_exit_codes_has_every_class() -> None:
    page = (DOCS / "exit-codes.md").read_text()
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.MegatronLionError)
        and kind is not errors.MegatronLionError
    ]
    assert len(classes) > 8
    for kind in classes:
        (line,) = [line for line in page.splitlines() if line.startswith("|") and f"`{kind.__name__}`" in line]
        assert line.split("|")[1].strip() == str(kind.exit_code)


def test_tables_fit_a_screen() -> None:
    wide = [
        f"{path.relative_to(REPO)}:{number}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.startswith("|") and len(line) > 120
    ]
    assert not wide


def test_the_navigation_lists_every_page() -> None:
    text = (REPO / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    listed = {page for group in nav for pages in group.values() for page in _uris(pages)}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= listed


def _uris(pages: str | list[dict[str, str]]) -> list[str]:
    return [pages] if isinstance(pages, str) else [uri for page in pages for uri in page.values()]


LINKS = [
    ("README.md", "[a](docs/theory.md#bounds)", "[a](theory.md#bounds)"),
    ("README.md", "![a](docs/figures/toy_paths.png)", "![a](figures/toy_paths.png)"),
    ("README.md", "[a](CHANGELOG.md)", "[a](repository/CHANGELOG.md)"),
    ("docs/theory.md", "[a](../README.md#install)", "[a](index.md#install)"),
    ("docs/theory.md", "[a](data.md)", "[a](data.md)"),
    ("docs/how-to/multi-node.md", "[a](../launching.md)", "[a](../launching.md)"),
    ("docs/how-to/multi-node.md", "[a](../../configs/gpt2_tiny.yaml)", "[a](../repository/configs/gpt2_tiny.yaml.md)"),
    ("docs/theory.md", "[a](../benchmarks/results)", "[a](repository/benchmarks/results/index.md)"),
    ("CHANGELOG.md", "[a](docs/data.md)", "[a](../data.md)"),
    ("benchmarks/results/rates_demo.md", "[a](rates_demo.csv)", "[a](rates_demo.csv)"),
    ("docs/theory.md", "[a](https://example.org/x) [b](#bounds)", "[a](https://example.org/x) [b](#bounds)"),
    ("docs/theory.md", "`[a](../README.md)`", "`[a](../README.md)`"),
    ("docs/theory.md", "```\n[a](../README.md)\n```\n", "```\n[a](../README.md)\n```\n"),
    ("docs/theory.md", "````\n```\n[a](../README.md)\n```\n````\n", "````\n```\n[a](../README.md)\n```\n````\n"),
    ("docs/theory.md", "[a](../no_such_file.md)", "[a](../no_such_file.md)"),
    ("docs/theory.md", "[a](../../outside.md)", "[a](../../outside.md)"),
]


@pytest.mark.parametrize(("name", "markdown", "wanted"), LINKS)
def test_links_fit_the_site(name: str, markdown: str, wanted: str) -> None:
    assert script("site_pages").adapted(markdown, name) == wanted
