"""A corpus for the tests of the probe."""

from __future__ import annotations

import pytest
from tiny import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=200)
