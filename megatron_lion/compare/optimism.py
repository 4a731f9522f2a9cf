"""How much too low the loss of the best of several settings is expected to be, because its seeds were lucky."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

UPPER = (
    "the stated optimism is an upper estimate: it assumes that all settings are equally good and that each seed's luck differs from "
    "setting to setting; it applies to the test loss too, because luck lowers the losses on both splits"
)


@cache
def expected_maximum(count: int) -> float:
    """Returns the expected largest of `count` independent standard normal values.

    Raises:
        ValueError: `count` is below 1.

    Source: David and Nagaraja, "Order Statistics", 3rd edition, section 3.1:
    E[max] = ∫₀^∞ (1 − Φᵏ) dx − ∫₋∞^0 Φᵏ dx.

    Example:
        >>> [round(expected_maximum(count), 4) for count in (1, 2, 3, 8)]
        [0.0, 0.5642, 0.8463, 1.4236]
    """
    from scipy.integrate import quad  # imported here: scipy takes long to load, and most verbs do not need it
    from scipy.special import log_ndtr

    if count < 1:
        raise ValueError(f"count = {count}: expected at least 1")
    if count == 1:
        return 0.0
    above, _ = quad(lambda x: -math.expm1(count * log_ndtr(x)), 0, math.inf, epsabs=1e-10)
    below, _ = quad(lambda x: math.exp(count * log_ndtr(x)), -math.inf, 0, epsabs=1e-10)
    return float(above - below)


@dataclass(frozen=True, kw_only=True)
class Optimism:
    """The expected optimism of the mean loss of a chosen setting.

    Attributes:
        tries: number of settings that could have been chosen.
        seeds: seeds over which the settings were compared.
        reported: seeds in the reported mean; the others did not take part in the choice.
        deviation: standard deviation of a run's test loss over seeds (nats per token), or None if it is not known.
        measured_by: number of settings with several seeds that measured it.
    """

    tries: int
    seeds: int
    reported: int
    deviation: float | None = None
    measured_by: int = 0

    @property
    def factor(self) -> float:
        """The optimism in standard deviations of one run.

        Example:
            >>> round(Optimism(tries=8, seeds=1, reported=1).factor, 3), round(Optimism(tries=8, seeds=4, reported=4).factor, 3)
            (1.424, 0.712)
            >>> Optimism(tries=1, seeds=1, reported=1).factor
            0.0
        """
        if self.tries < 2 or not self.reported:
            return 0.0
        # The luck of the mean over the `seeds` runs, diluted by the further seeds of the chosen setting.
        return expected_maximum(self.tries) * math.sqrt(self.seeds) / self.reported

    def sentence(self) -> str:
        """The number of tries and the expected optimism.

        Example:
            >>> Optimism(tries=8, seeds=4, reported=4, deviation=0.02, measured_by=8).sentence().partition(" (")[0]
            'best of 8 settings, 4 seeds each: its losses are expected to be up to 0.0142 too low'
            >>> Optimism(tries=1, seeds=2, reported=2).sentence()
            '1 setting tried, so its losses are not too low by selection'
        """
        tries = f"best of {count_of(self.tries, 'setting')}, {count_of(self.seeds, 'seed')} each"
        if not self.factor:
            return f"{count_of(self.tries, 'setting')} tried, so its losses are not too low by selection"
        if self.deviation is None:
            return (
                f"{tries}: its losses are expected to be up to {self.factor:.1f} standard deviations of a run too low; no setting "
                "has a second seed to measure that standard deviation"
            )
        return (
            f"{tries}: its losses are expected to be up to {self.factor * self.deviation:.3g} too low ({self.factor:.2f} seed "
            f"standard deviations of {self.deviation:.2g}, pooled over {count_of(self.measured_by, 'setting')})"
        )


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Returns the pooled standard deviation within groups, or None if no group has two values.

    Example:
        >>> pooled_deviation([[1.0, 3.0], [10.0, 12.0], [7.0]]) == math.sqrt(2)
        True
        >>> pooled_deviation([[1.0], [2.0]]) is None
        True
    """
    squares, freedom = 0.0, 0
    for values in groups:
        mean = math.fsum(values) / max(len(values), 1)
        squares += math.fsum((value - mean) ** 2 for value in values)
        freedom += max(len(values) - 1, 0)
    return math.sqrt(squares / freedom) if freedom else None


def count_of(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> count_of(1, "seed"), count_of(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{count} {noun}{'s' if count != 1 else ''}"
