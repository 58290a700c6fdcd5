"""What is expected of a pair of models: a class, and what copies gave on such models."""

from pathlib import Path

import pytest

from prolora.comparison.expectation import CLASSES, classify
from prolora.core.verdict import Verdict

QUALITY = Path(__file__).parents[2] / "bench/quality"


@pytest.mark.parametrize(
    ("verdict", "cut", "few_steps", "group"),
    [
        (Verdict(0.0, 1.0, 1.0), False, False, "same"),
        (Verdict(0.035, 0.999, 0.32), False, False, "alike"),
        (Verdict(0.3, 0.96, 0.55), False, False, "alike"),
        (Verdict(0.3, 0.96, 0.55), False, True, "few-step"),
        (Verdict(0.16, 0.99, 0.27), False, False, "changed"),
        (Verdict(0.16, 0.99, 0.27), True, True, "cut"),
        (Verdict(1.4, 0.0, 0.8), True, False, "apart"),
        (Verdict(0.6, 0.88, 0.43), False, True, "distant"),
        (Verdict(1.2, 0.72, 0.5, size=0.1), True, False, "distant"),
        # The same drift is little beside a large LoRA, and much beside a small one.
        (Verdict(0.006, 0.999, 0.05, size=0.03), False, False, "alike"),
        (Verdict(0.006, 0.999, 0.05, size=0.01), False, False, "changed"),
        (Verdict(0.3, 0.96, 0.55, size=0.01), False, False, "alike"),
    ],
)
def test_a_pair_falls_into_one_class(verdict, cut, few_steps, group):
    assert classify(verdict, cut, few_steps) == group


def test_a_check_mark_stands_only_where_most_arrives():
    for name, found in CLASSES.items():
        assert name == found.name and found.low <= found.share <= found.high
        assert (found.mark == "✔") == (found.low > 0.7)


@pytest.fixture
def calibrate(monkeypatch):
    """The script that makes the table."""
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(QUALITY))
    import calibrate

    return calibrate


def test_the_shares_of_the_table_are_those_of_the_stored_scores(calibrate):
    found = {name: calibrate.summarise(x) for name, x in calibrate.collect_shares().items()}
    shipped = {name: (x.low, x.share, x.high) for name, x in CLASSES.items() if name != "same"}
    assert found == shipped


def test_a_kind_with_more_seeds_does_not_count_more(calibrate):
    one = [("near", 1.0), ("far", 0.0)]
    for shares in (one, one + [("far", 0.0)] * 2):
        assert calibrate.summarise(shares)[1] == pytest.approx(0.5)


def test_a_quantile_of_equal_weights_is_the_usual_one(calibrate):
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert calibrate.find_quantile(values, [1.0] * 5, 0.5) == 3.0
    assert calibrate.find_quantile(values, [1.0] * 5, 0.2) == pytest.approx(1.5)
