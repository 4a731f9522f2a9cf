"""Coverage of the intervals over seeds by simulation: the stored results of benchmarks/seed_intervals.py, and a short run.

Every tolerance is four standard errors of a share among the draws made here.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import seed_intervals as simulation

NORMAL = simulation.SEEDS["normal"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads((Path(simulation.__file__).parent / "results" / "seed_intervals.json").read_text())


def tolerance(share: float, draws: int) -> float:
    return 4 * math.sqrt(max(share * (1 - share), 0.002) / draws)


def test_the_stored_coverage_of_normal_seeds_is_at_least_93_percent(stored: dict[str, Any]) -> None:
    gaps = {name: row for name, row in stored["gap"].items() if name.startswith("normal")}
    assert len(gaps) == 3
    for row in (stored["mean"]["normal"], *gaps.values(), *stored["rates"].values()):
        assert min(row.values()) >= 0.93, row
    for row in stored["targets"].values():
        assert min(geometric for geometric, _ in row.values()) >= 0.93, row
    for row in stored["families"].values():
        assert max(row.values()) <= 0.055, row
    assert all(0.94 <= share <= 0.96 for share in stored["mean"]["normal"].values())


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_of_a_mean(rng: np.random.Generator, n: int) -> None:
    found = simulation.mean_coverage(rng, n, NORMAL, 4000)
    assert found == pytest.approx(0.95, abs=tolerance(0.95, 4000))  # exact for normal values


@pytest.mark.parametrize("scale", [1, simulation.SPREAD])
@pytest.mark.parametrize("sides", [(2, 2), (3, 3), (10, 10), (2, 5), (3, 10), (2, 10), (4, 8)])
def test_the_interval_of_a_gap(
    rng: np.random.Generator, stored: dict[str, Any], sides: tuple[int, int], scale: int
) -> None:
    name = "normal" if scale == 1 else f"normal, standard deviations {scale}:1"
    expected = stored["gap"][name][f"{sides[0]} v {sides[1]}"]
    found = simulation.gap_coverage(rng, sides, NORMAL, 4000, scale=scale)
    assert found == pytest.approx(expected, abs=tolerance(expected, 4000))


@pytest.mark.parametrize("sides", [(2, 2), (3, 3), (5, 5)])
def test_the_power_against_a_gap(rng: np.random.Generator, stored: dict[str, Any], sides: tuple[int, int]) -> None:
    for gap in simulation.GAPS:
        expected = stored["power"][str(gap)][f"{sides[0]} v {sides[1]}"]
        found = 1 - simulation.gap_coverage(rng, sides, NORMAL, 1000, gap=gap)
        assert found == pytest.approx(expected, abs=tolerance(expected, 1000))


@pytest.mark.parametrize("settings", [2, 4, 6])
@pytest.mark.parametrize("n", [3, 5])
def test_equal_settings_are_rarely_called_different(rng: np.random.Generator, settings: int, n: int) -> None:
    # Six settings have 15 pairs, of which only those with the lowest mean are judged.
    assert simulation.false_families(rng, settings, n, 1000) <= 0.05 + tolerance(0.05, 1000)


@pytest.mark.parametrize("curve", simulation.CURVES.values(), ids=simulation.CURVES)
def test_the_interval_of_a_rate_constant_of_three_seeds(rng: np.random.Generator, curve: Any) -> None:
    found = simulation.rate_coverage(rng, 3, curve, 800)
    assert found == pytest.approx(0.95, abs=tolerance(0.95, 800))


@pytest.mark.parametrize("between", [0.03, 0.2])
def test_the_interval_of_the_steps_to_a_target(rng: np.random.Generator, between: float) -> None:
    found, plain = simulation.target_coverage(rng, 4, 800, between=between)
    assert found == pytest.approx(0.95, abs=tolerance(0.95, 800))
    if between > 0.1:  # where seeds scatter by a factor, only logarithms have a symmetric interval
        assert plain < found
