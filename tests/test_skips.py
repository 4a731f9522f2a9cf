"""A skip with an unlisted reason fails in CI; a listed reason, or a skip outside CI, does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

HERE = Path(__file__).resolve().parent
SUITE = """
import pytest

def test_runs(): pass

def test_listed(): pytest.skip("needs 4 CUDA devices, 1 visible")

@pytest.mark.skipif(True, reason="needs some-package")
def test_by_mark(): pass

def test_inside(): pytest.importorskip("no_such_package")

@pytest.fixture
def absent(): pytest.skip("no data")

def test_by_fixture(absent): pass

@pytest.mark.xfail(reason="needs some-package", strict=True)
def test_expected_to_fail(): assert False
"""
MODULE = 'import pytest\npytest.skip("needs some-package", allow_module_level=True)\n'
DOCTEST = '''
"""
>>> import pytest
>>> pytest.skip("needs some-package")
"""
'''


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A small suite with this suite's layout and conftest.py; CI is not set."""
    monkeypatch.delenv("CI", raising=False)
    tests = pytester.mkdir("tests")
    shutil.copy(HERE / "conftest.py", tests)
    (tests / "test_some.py").write_text(SUITE)
    pytester.makeini("[pytest]\naddopts = --doctest-modules")
    return pytester


def run(suite: pytest.Pytester, *words: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", *words)


def test_skips_are_skips_on_a_developers_machine(suite: pytest.Pytester) -> None:
    run(suite, "tests").assert_outcomes(passed=1, skipped=4, xfailed=1)


@pytest.mark.parametrize(("ci", "words"), [("true", ()), ("1", ()), ("", ("--no-skips",))])
def test_unlisted_skips_fail_in_ci(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CI", ci)
    found = run(suite, "tests", *words)
    # A fixture's skip belongs to the set-up of its test: pytest counts it as an error.
    found.assert_outcomes(passed=1, skipped=1, failed=1, errors=2, xfailed=1)
    found.stdout.fnmatch_lines(["*could not import 'no_such_package'*", "Allowed: see tests/skips.py."])
    assert found.ret == pytest.ExitCode.TESTS_FAILED


def test_a_skipped_module_fails_in_ci(suite: pytest.Pytester) -> None:
    (suite.path / "tests" / "test_module.py").write_text(MODULE)
    assert run(suite, "tests").ret == 0
    found = run(suite, "tests", "--no-skips")
    assert found.ret == pytest.ExitCode.INTERRUPTED
    found.stdout.fnmatch_lines(["*skipped, which CI does not allow for this reason: needs some-package"])


def test_a_skip_outside_of_the_tests_folder_fails_in_ci(suite: pytest.Pytester) -> None:
    """Doctests of the packages are outside the folder whose conftest.py contains the policy.

    The inner run imports the module into this process: its name must not be that of a module of the outer suite.
    """
    suite.makepyfile(outside_of_the_tests_folder=DOCTEST)
    run(suite, "tests", "outside_of_the_tests_folder.py").assert_outcomes(passed=1, skipped=5, xfailed=1)
    assert "skipped" in run(suite, "tests", "outside_of_the_tests_folder.py", "--no-skips").stdout.str()
    run(suite, "tests", "outside_of_the_tests_folder.py", "--no-skips").assert_outcomes(
        passed=1, skipped=1, failed=2, errors=2, xfailed=1
    )
