"""Means where something is unknown."""

import math

from prolora.core.means import mean_defined, weighted_mean


def test_unknown_values_do_not_count():
    assert mean_defined([1.0, math.nan, 3.0]) == 2
    assert math.isnan(mean_defined([math.nan])) and math.isnan(mean_defined([]))
    assert weighted_mean([(1, 2.0), (3, 4.0), (5, None)]) == 3.5


def test_without_weight_there_is_no_mean():
    assert weighted_mean([]) is None and weighted_mean([(0, 2.0)]) is None
