"""What is expected of a pair of models: a class, and what copies gave on such models."""

import re
from pathlib import Path

import pytest

from prolora.comparison.expectation import CLASSES, classify
from prolora.core.verdict import PairVerdict

QUALITY = Path(__file__).parents[2] / "bench/quality"


LARGE = 0.2  # of a LoRA, beside the weights that it changes


@pytest.mark.parametrize(
    ("verdict", "cut", "few_steps", "group"),
    [
        (PairVerdict(0.0, 1.0), False, False, "same"),
        (PairVerdict(0.0, 1.0), False, True, "same"),
        (PairVerdict(0.035, 0.999, LARGE), False, False, "alike"),
        (PairVerdict(0.035, 0.999), False, False, "changed"),
        (PairVerdict(0.3, 0.96, LARGE), False, True, "few-step"),
        (PairVerdict(0.16, 0.99, LARGE), False, False, "changed"),
        (PairVerdict(0.16, 0.99, LARGE), True, False, "cut"),
        # A long training of another look.
        (PairVerdict(0.3, 0.96, LARGE), False, False, "changed"),
        (PairVerdict(1.4, 0.0, LARGE), True, True, "apart"),
        (PairVerdict(0.6, 0.88, LARGE), False, True, "few-step"),
        (PairVerdict(0.6, 0.88, LARGE), True, False, "distant"),
        # The same drift is little beside a large LoRA, and much beside a small one.
        (PairVerdict(0.006, 0.999, size=0.03), False, False, "alike"),
        (PairVerdict(0.006, 0.999, size=0.01), False, False, "changed"),
    ],
)
def test_a_pair_falls_into_one_class(verdict, cut, few_steps, group):
    assert classify(verdict, cut, few_steps) == group


def test_a_number_is_printed_only_with_a_check_mark_and_where_it_says_something():
    for name, found in CLASSES.items():
        assert name == found.name and ("{low" in found.outcome) == (found.range is not None)
        assert not re.search(
            r"\d", found.headline + found.outcome.replace("{low:.0%} to {high:.0%}", "")
        )
        if found.range:
            low, high = found.range
            assert found.mark == "✔" and 0.7 <= low <= high <= low + 0.4


@pytest.fixture
def calibrate(monkeypatch):
    """The script that makes the table."""
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(QUALITY))
    import calibrate

    return calibrate


def test_the_ranges_of_the_classes_are_those_that_held_in_worlds_left_out(calibrate):
    scores = calibrate.collect_scores()
    for name, found in CLASSES.items():
        if name != "same":
            assert calibrate.choose_range(scores[name], found.headline) == found.range, name
    assert CLASSES["alike"].range == (0.82, 0.99)
    trials = {
        name: calibrate.leave_worlds_out(x, CLASSES[name].headline) for name, x in scores.items()
    }
    rights = {name: trial.right for name, trial in trials.items() if trial.right == trial.right}
    assert rights.keys() == {"alike", "cut", "few-step", "apart"} and min(rights.values()) >= 0.6
    assert trials["few-step"].held < 0.4 and trials["cut"].held < 0.6


def test_a_range_that_fails_in_a_world_left_out_is_not_chosen(calibrate):
    kinds = [(w, k, s) for w, k, s in (("a", "a1", 0.9), ("a", "a2", 0.95), ("b", "b1", 0.5))]
    scores = [calibrate.Score(*kind) for kind in kinds]
    assert calibrate.choose_range(scores, "This should work") is None
    held = [calibrate.Score(w, f"{w}{i}", 0.8 + i / 50) for w in "ab" for i in range(5)]
    assert calibrate.choose_range(held, "This should work") is not None
    assert calibrate.choose_range(held, "Do not expect this") is None
    assert calibrate.choose_range(held[:5], "This should work") is None


def test_no_stored_score_is_of_a_method_that_was_deleted(calibrate):
    """Today `auto` is a copy, or a refusal."""
    for _, _, row, verdict in calibrate.read_rows():
        if verdict.related and "auto" in row["losses"]:
            assert row["losses"]["auto"] == row["losses"]["copy @ 1"]


def test_a_kind_with_more_seeds_does_not_count_more(calibrate):
    one = [calibrate.Score("w", "near", 1.0), calibrate.Score("w", "far", 0.0)]
    for scores in (one, one + [calibrate.Score("w", "far", 0.0)] * 2):
        assert calibrate.summarise(scores)[1] == pytest.approx(0.5)


def test_a_quantile_of_equal_weights_is_the_usual_one(calibrate):
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert calibrate.find_quantile(values, [1.0] * 5, 0.5) == 3.0
    assert calibrate.find_quantile(values, [1.0] * 5, 0.2) == pytest.approx(1.5)
