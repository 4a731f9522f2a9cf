"""Config of the small runs that the probe tests use."""

from __future__ import annotations

from tiny import tiny_config


def probe_config(folder, corpus, **changes):
    return tiny_config(folder, corpus, **{"probe__every": 1, "probe__num_batches": 3, **changes})
