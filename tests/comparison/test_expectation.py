"""What is expected of a pair of bases: by a few classes, checked in a world that was left out."""

import json
import sys
from pathlib import Path

import pytest

from prolora import Verdict
from prolora.comparison.expectation import (
    ALIKE,
    APART,
    CHANGED,
    CUT,
    DISTANT,
    WANTS,
    classify,
    expect_shares,
    load_calibration,
)

QUALITY = Path(__file__).parents[2] / "bench/quality"


@pytest.mark.parametrize(
    ("verdict", "cut", "group"),
    [
        (Verdict(0.035, 0.999, 0.32), False, ALIKE),
        (Verdict(0.3, 0.96, 0.55), False, ALIKE),
        (Verdict(0.16, 0.99, 0.27), False, CHANGED),
        (Verdict(0.16, 0.99, 0.27), True, CUT),
        (Verdict(1.4, 0.0, 0.8), True, APART),
        (Verdict(0.6, 0.88, 0.43), False, DISTANT),
        (Verdict(1.2, 0.72, 0.5, size=0.1), True, DISTANT),
        # The same drift is little beside a large LoRA, and much beside a small one.
        (Verdict(0.006, 0.999, 0.05, size=0.03), False, ALIKE),
        (Verdict(0.006, 0.999, 0.05, size=0.01), False, CHANGED),
        (Verdict(0.3, 0.96, 0.55, size=0.01), False, ALIKE),
    ],
)
def test_a_pair_falls_into_one_class_and_has_its_shares(verdict, cut, group):
    assert classify(verdict, cut) == group
    shares = {(x.method, x.want): x for x in expect_shares(verdict, cut)}
    assert {"copy", "auto", "prolora"} <= {method for method, _ in shares}
    assert all(x.low <= x.share <= x.high and x.kinds for x in shares.values())


def test_classes_are_ordered_as_their_names_say():
    cases = [(0.03, 0.3, False), (0.1, 0.3, True), (0.16, 0.27, False)]
    found = [expect_shares(Verdict(d, 0.99, s), cut) for d, s, cut in cases]
    means = [next(x.share for x in f if x.method == "auto" and x.want == "look") for f in found]
    assert means == sorted(means, reverse=True) and means[0] > 0.7 > means[2] > 0.3


def test_nothing_is_promised_of_relatives_that_are_farther_apart_than_any_that_was_measured():
    strange, far = Verdict(0.3, 0.96, 0.1), Verdict(1.4, 0.75, 0.5)
    assert strange.related and not strange.go and far.go
    assert expect_shares(strange) == expect_shares(far) == ()


def test_intervals_hold_three_quarters_of_a_world_that_was_left_out():
    checked = load_calibration()["checked"]
    assert set(checked) == {"digits", "icons"}
    for facts in checked.values():
        assert facts["inside"] >= 0.75


@pytest.fixture
def quality(monkeypatch):
    """The study's scripts."""
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(QUALITY))


def test_the_shipped_file_is_what_the_stored_scores_give(quality, tmp_path, monkeypatch):
    import calibrate

    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", "--out", str(out)])
    calibrate.main()
    made, shipped = json.loads(out.read_text()), load_calibration()
    assert made["expected"] == shipped["expected"] and made["checked"] == shipped["checked"]
    assert {x["want"] for several in made["expected"].values() for x in several} == set(WANTS)


def test_a_kind_with_more_seeds_does_not_count_more(quality):
    import calibrate

    one = [("w", ALIKE, "near", 1.0), ("w", ALIKE, "far", 0.0)]
    for shares in (one, one + [("w", ALIKE, "far", 0.0)] * 2):
        assert calibrate.summarise(shares)[0] == pytest.approx(0.5)


def test_a_quantile_of_equal_weights_is_the_usual_one(quality):
    from calibrate import find_quantile

    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert find_quantile(values, [1.0] * 5, 0.5) == 3.0
    assert find_quantile(values, [1.0] * 5, 0.2) == pytest.approx(1.5)


@pytest.mark.slow
def test_no_rule_with_more_constants_is_needed_by_the_stored_scores(quality):
    """In either world the shipped rule loses little to the best fixed copy of each kind."""
    import left_out

    from prolora.core.verdict import DAMPING, NOISE_SPREAD

    rule = left_out.make_rule(DAMPING, NOISE_SPREAD)
    icons = left_out.compare(left_out.read_world("icons", "look"), rule)
    digits = left_out.compare(left_out.read_world("digits", "look"), rule)
    assert sum(icons.values()) / len(icons) > -0.005 and min(icons.values()) > -0.03
    assert min(loss for kind, loss in digits.items() if kind != "inverted") > -0.03
