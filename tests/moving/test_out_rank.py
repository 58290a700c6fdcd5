"""The forms of --out-rank."""

import pytest

from prolora.moving.options import is_out_rank


@pytest.mark.parametrize("form", ["exact", "50%", "0.1%", 100, 0.5])
def test_ranks_shares_and_percentages_are_taken(form):
    assert is_out_rank(form)


@pytest.mark.parametrize(
    "form", ["100", "100MB", "0%", "150%", "-1%", "half", "", 0, 1.0, True, None]
)
def test_nothing_else_is_a_rank(form):
    assert not is_out_rank(form)
