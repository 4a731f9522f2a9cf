"""A skipped test fails the suite in CI, unless its reason is listed here.

Otherwise a package that CI does not install would silently drop its tests. The policy is active if the environment
variable CI is true, or with --no-skips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

# Pattern that must match the whole reason: why a CI machine cannot run such a test.
ALLOWED = {
    r"needs a CUDA device": "CI machines have no GPU",
    r"needs \d+ CUDA devices, \d+ visible": "CI machines have no GPU; a GPU machine may have fewer than a layout needs",
    r"this machine has a GPU": "the test checks the error on a machine without a GPU",
    r"this machine has NVIDIA's driver": "the test needs a machine without the driver",
    r"needs deepspeed": "deepspeed is not part of the ci extra",
    r"no \.\./shared/data beside the checkout: .*": "real text and vocabularies are not part of the repository",
}
if os.environ.get("CI_WITHOUT_BROWSER") == "true":  # .ci/run sets it, with a warning, if no package index has a browser
    ALLOWED[r"no chromium, chromium-browser or google-chrome on the PATH"] = "this machine cannot install one"


def add_option(parser: pytest.Parser) -> None:
    """Adds --no-skips."""
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="fail a skipped test unless tests/skips.py lists its reason; always on if the variable CI is true",
    )


def is_active(config: pytest.Config) -> bool:
    return bool(config.getoption("--no-skips")) or os.environ.get("CI", "").lower() in ("true", "1")


def is_allowed(reason: str) -> bool:
    return any(re.fullmatch(pattern, reason) for pattern in ALLOWED)


class NoSkips:
    """Plugin that turns a skip with an unlisted reason into a failure of the test, or of the module's collection."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        return _judged((yield))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        return _judged((yield))


def _judged[Report: (pytest.TestReport, pytest.CollectReport)](report: Report) -> Report:
    # pytest reports an expected failure as a skip, although the test ran.
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not is_allowed(reason):
            report.outcome = "failed"
            report.longrepr = (
                f"skipped, which CI does not allow for this reason: {reason}\nAllowed: see tests/skips.py."
            )
    return report
