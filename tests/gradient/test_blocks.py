"""Mean and error of a value that is known of running means."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lion.gradient.blocks import mean_and_error
from megatron_lion.intervals import t_quantile


@pytest.mark.parametrize("population", [None, 128.0])
def test_the_error_of_a_mean_from_its_reads_covers(population):
    generator = np.random.default_rng(5)
    held, trials = 0, 500
    for _ in range(trials):
        values = generator.normal(2.0, 3.0, 128 if population else 64)
        truth = values.mean() if population else 2.0
        reads = [(k, 10 * k, float(values[:k].mean())) for k in (1, 2, 4, 8, 16, 32, 64)]
        mean, error = mean_and_error(reads, population)
        held += abs(mean - truth) <= t_quantile(6) * error
    assert 0.92 <= held / trials <= 0.98
