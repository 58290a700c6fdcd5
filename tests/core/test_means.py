"""Means where something is unknown."""

from prolora.core.means import weighted_mean


def test_unknown_values_do_not_count():
    assert weighted_mean([(1, 2.0), (3, 4.0), (5, None)]) == 3.5


def test_without_weight_there_is_no_mean():
    assert weighted_mean([]) is None and weighted_mean([(0, 2.0)]) is None
