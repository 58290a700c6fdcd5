"""The forms of --out-rank."""

import pytest

from prolora.moving.out_rank import is_out_rank, parse_percentage, parse_size_limit


@pytest.mark.parametrize(
    "text, size",
    [
        ("100MB", 10**8),
        ("1.5 GiB", 3 << 29),
        ("900k", 900_000),
        ("5000B", 5000),
        (" 2mib ", 2 << 20),
    ],
)
def test_a_number_with_a_unit_is_the_size_of_a_file(text, size):
    assert parse_size_limit(text) == size and is_out_rank(text)
    assert parse_percentage(text) is None


@pytest.mark.parametrize("form", ["100", "exact", "50%", "MB", "0MB", "-1MB", "half", "", 100, 0.5])
def test_nothing_else_is_a_size(form):
    assert parse_size_limit(form) is None
    assert is_out_rank(form) == (form in ("exact", "50%", 100, 0.5))
