"""Settings of the property tests: the same examples in every run, or more and random ones in the nightly profile.

The profile is "ci" unless --hypothesis-profile or the variable HYPOTHESIS_PROFILE names another; `make test-nightly`
runs the property tests with "nightly".
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

NIGHTLY_FACTOR = 10


def load_profile() -> None:
    """Registers the profiles and loads one; must run before the first test module is imported."""
    # derandomize: a failure in CI must be reproducible. No deadline: a busy machine must not fail a test.
    settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
    nightly = {"derandomize": False, "max_examples": 100 * NIGHTLY_FACTOR}
    settings.register_profile("nightly", deadline=None, print_blob=True, **nightly)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "ci")


def examples(count: int, **changes: Any) -> settings:
    """Settings of a test with `count` examples, ten times as many in the nightly profile."""
    nightly = settings.get_current_profile_name() == "nightly"
    return settings(max_examples=count * (NIGHTLY_FACTOR if nightly else 1), **changes)
