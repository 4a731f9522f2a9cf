"""Round tick values of an axis, their texts, and label positions that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) between two limits, about `count` of them.

    >>> ticks(0, 1000, 4), ticks(3.9, 11.1, 5)
    ([0.0, 200.0, 400.0, 600.0, 800.0, 1000.0], [4.0, 6.0, 8.0, 10.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten between two decimal logarithms, at most about `count`; 1, 2 and 5 times them if fewer than three fit.

    >>> log_ticks(-0.1, 4.1, 5), log_ticks(0.9, 2.1, 5)
    ([1.0, 10.0, 100.0, 1000.0, 10000.0], [10.0, 20.0, 50.0, 100.0])
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    inside = [p for p in powers if low <= p <= high]
    if len(inside) < 3:
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m) + p <= high]
    return [10.0**p for p in inside[:: -(-len(inside) // (count + 1))]]


def short(value: float) -> str:
    """Text of a tick: thousands as k, millions as M, thousands of millions as B.

    >>> [short(v) for v in (0.0, 0.25, 7.0, 1000.0, 12500.0, 2e6, 3e10)]
    ['0', '0.25', '7', '1k', '12.5k', '2M', '30B']
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart, as little as needed, until neighbours are at least `gap` apart within [low, high].

    Labels that overlap form a cluster, which is centred on the mean of their wanted positions.

    >>> [round(p, 2) for p in spread([1.0, 1.1, 5.0], gap=1.0, low=0.0, high=10.0)]
    [0.55, 1.55, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # (labels, centre) of each cluster; each label begins as its own.
    clusters: list[tuple[list[int], float]] = [([i], min(max(positions[i], low), high)) for i in order]
    place = 0
    while place + 1 < len(clusters):
        (left, left_centre), (right, right_centre) = clusters[place : place + 2]
        if right_centre - left_centre >= gap * (len(left) + len(right)) / 2 - 1e-12:
            place += 1
            continue
        members = [*left, *right]
        half = gap * (len(members) - 1) / 2
        centre = sum(positions[i] for i in members) / len(members)
        clusters[place : place + 2] = [(members, min(max(centre, low + half), max(high - half, low + half)))]
        place = max(place - 1, 0)  # a cluster that grew may now touch the one before it
    placed = [0.0] * len(positions)
    for members, centre in clusters:
        for rank, i in enumerate(members):
            placed[i] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed
