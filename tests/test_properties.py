"""Property tests use the same examples in every run, and more and random examples in the nightly profile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]

SUITE = """
import json
from hypothesis import given, strategies as st
from properties import examples

seen = []

@examples(7)
@given(st.integers(0, 10**9))
def test_property(number):
    seen.append(number)

def test_plain():
    open("seen.json", "w").write(json.dumps(seen))
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.Pytester]:
    """A property test and a test that writes the examples it got, with this suite's conftest.py."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HYPOTHESIS_PROFILE", raising=False)
    before = settings.get_current_profile_name()
    shutil.copy(Path(__file__).resolve().parent / "conftest.py", pytester.path)
    pytester.makepyfile(test_some=SUITE)
    yield pytester
    settings.load_profile(before)


def seen(suite: pytest.Pytester, *words: str) -> list[int]:
    suite.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", *words).assert_outcomes(passed=2)
    numbers: list[int] = json.loads((suite.path / "seen.json").read_text())
    return numbers


def test_examples_are_the_same_at_every_run(suite: pytest.Pytester) -> None:
    first = seen(suite)
    assert len(first) == 7
    assert seen(suite) == first


def test_examples_are_random_and_more_at_night(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seen(suite, "--hypothesis-profile", "nightly")
    assert len(first) == 70
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "nightly")
    second = seen(suite)
    assert len(second) == 70
    assert first != second


def test_the_nightly_command_chooses_the_property_tests(suite: pytest.Pytester) -> None:
    found = suite.runpytest_inprocess("-p", "no:xdist", "-m", "hypothesis", "--hypothesis-profile", "nightly")
    found.assert_outcomes(passed=1, deselected=1)
