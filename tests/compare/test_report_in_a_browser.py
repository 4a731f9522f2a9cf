"""The report in a real browser: no cut text, no sideways scrolling on a phone, light and dark, no requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from synthetic_runs import write_run

from megatron_lion.compare.best import best_table, choose_best
from megatron_lion.compare.html_report import write_report
from megatron_lion.compare.run_tables import build_tables
from megatron_lion.compare.selection import read_runs
from megatron_lion.runs.record import RunRecord

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
LION = (0x00, 0x72, 0xB2)
DESKTOP, PHONE = 1280, 390


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Two models, one with three optimizers, several rates and several seeds: long names and many curves."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(root / f"lion-{lr}-{seed}", lr=lr, seed=seed, offset=lr)
        for lr in (1e-3, 3e-4, 1e-4)
        for seed in (1, 2)
    ]
    folders += [write_run(root / f"sgd-{lr}", optimizer="sgd", lr=lr, steps=800) for lr in (0.3, 0.1, 0.03)]
    folders += [write_run(root / f"adamw-{lr}", optimizer="adamw", lr=lr) for lr in (3e-3, 1e-3)]
    folders += [write_run(root / "medium", model="gpt2-medium", d=354_871_296)]
    return read_runs(folders)


@pytest.fixture(scope="module")
def page(runs: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tables = [best_table(choose_best(runs)), *build_tables(runs)]
    return write_report(runs, tables, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_is_cut_or_fetched_or_wider_than_the_screen(page: Path, browser: Browser, width: int) -> None:
    said = json.loads(browser.measure(page, width, 900))
    assert said["window"] == width
    assert said["width"] <= width, "the page scrolls sideways"
    assert said["cut"] == []
    assert said["overlapping"] == []
    assert said["fetched"] == []
    assert set(said["shown"]) == {"over-step"}
    assert len(said["shown"]) == 11


@pytest.mark.parametrize("axis", ["tokens", "time"])
def test_the_chosen_axis_alone_is_displayed(runs: list[RunRecord], browser: Browser, tmp_path: Path, axis: str) -> None:
    page = write_report(runs, [], tmp_path / f"{axis}.html", axis)
    said = json.loads(browser.measure(page, DESKTOP, 900))
    assert set(said["shown"]) == {f"over-{axis}"}
    assert len(said["shown"]) == 11
    assert said["cut"] == []


@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)])
def test_the_picture_shows_the_charts(page: Path, browser: Browser, width: int, dark: bool) -> None:
    from PIL import Image

    with Image.open(browser.screenshot(page, width, 1000, dark=dark)) as image:
        pixels = image.convert("RGB").crop((0, 0, width, 1000))
    background = pixels.getpixel((2, 2))
    assert (sum(background) < 150) is dark
    counts = {colour: count for count, colour in pixels.getcolors(1 << 24)}
    assert len(counts) > 50, "the picture is blank"
    assert counts[background] < 0.9 * width * 1000
    assert (LION in counts) is not dark, "the dark page lightens the curves"
