"""The verdict in words: a mark, what to expect, what was done; no word of the mathematics."""

import re

import pytest
from reports import make_report, make_row

from prolora import Verdict
from prolora.comparison.expectation import expect_shares
from prolora.workflow.in_words import (
    A_VECTOR,
    find_expected,
    judge,
    name_amount,
    tell_fit,
    tell_method,
    tell_next,
)

MATHS = re.compile(r"energy|coverage|module|drift|cosine|norm\b|Φ|κ|update|subspace|basis|--")

RELATED, CHANGED = Verdict(0.1, 0.99, 0.5), Verdict(0.15, 0.99, 0.3)
DISTANT = Verdict(0.9, 0.8, 0.5)
FAR, APART = Verdict(0.6, 0.95, 0.2), Verdict(1.4, 0.0, 0.1)


@pytest.mark.parametrize(
    ("verdict", "placed", "mark", "said"),
    [
        (RELATED, 1.0, "✔", "This should work: expect most"),
        (RELATED, 0.2, "⚠", "most of this LoRA belongs to parts that t lacks"),
        (FAR, 1.0, "⚠", "t has learnt something else"),
        (APART, 1.0, "✖", "nothing in common"),
        (Verdict(0.0, 1.0, 0.0), 1.0, "✔", "works as it is"),
        (None, 1.0, "✔", "were not compared"),
        (RELATED, None, "✔", "This should work"),
    ],
)
def test_a_mark_says_how_it_stands(verdict, placed, mark, said):
    found, headline = judge(verdict, placed, "t")
    assert found == mark and said in headline


@pytest.mark.parametrize("method", ["copy", "damped", "prolora"])
@pytest.mark.parametrize("verdict", [RELATED, CHANGED, FAR, APART, None])
def test_no_line_of_the_verdict_needs_the_mathematics(method, verdict):
    report = make_report(method=method, asked="auto", verdict=verdict)
    told = report.in_words()
    for line in (told.headline, *told.lines):
        assert not MATHS.search(line.replace("weights", "")), line
        assert line[0].isupper() or line.startswith("prolora")
        assert line.endswith(".")
    assert 2 <= len(told.lines) <= 4 and any(line.startswith("Next:") for line in told.lines)


def test_what_is_lost_is_said_in_words_too():
    rows = [make_row("a"), make_row("b", "refused", reason="its file is damaged")]
    report = make_report(rows, unread=("b",), left_out={"emb": "an embedding"})
    cautions = " ".join(report.in_words().cautions)
    assert "b: its file is damaged" in cautions and "emb: an embedding" in cautions
    assert "1 update of the file could" in cautions and "1 tensor of the file stays" in cautions
    two = make_report(rows, unread=("b", "a"), left_out={"emb": "x", "emb2": "y"}).in_words()
    assert "2 updates of the file could" in str(two) and "2 tensors of the file stay " in str(two)


def test_a_dry_run_says_that_nothing_was_written():
    told = make_report(dry_run=True, verdict=None).in_words()
    assert "nothing was written" in told.headline and "Next" not in str(told)


@pytest.mark.parametrize(
    ("share", "word"),
    [
        (1.2, "All"),
        (0.9, "Most"),
        (0.66, "About two thirds"),
        (0.5, "About half"),
        (0.0, "Very little"),
    ],
)
def test_shares_have_names(share, word):
    assert name_amount(share) == word


@pytest.mark.parametrize(
    ("verdict", "placed", "mark", "word"),
    [
        (RELATED, 1.0, "✔", "most"),
        (CHANGED, 1.0, "⚠", "about half"),
        (DISTANT, 1.0, "⚠", "about half"),
        (CHANGED, 0.9, "✔", "most"),  # blocks were cut out, which says more than the drift
    ],
)
def test_what_to_expect_comes_first_in_one_of_three_words_with_its_interval(
    verdict, placed, mark, word
):
    found, headline = judge(verdict, placed, "t")
    wanted = expect_shares(verdict, placed < 1)
    auto = next(x for x in wanted if x.method == "auto" and x.want == "look")
    low, high = max(0.0, auto.low), min(1.0, auto.high)
    assert found == mark and f"xpect {word} ({auto.share:.0%})" in headline
    assert f"{low:.0%} to {high:.0%}" in headline
    assert str(make_report(verdict=verdict).in_words()).startswith(("✔", "⚠"))


def test_a_copy_is_said_to_fit_only_where_much_is_expected_of_it():
    """Drift that is spread as far as this weakens nothing, however large it is."""
    fits = tell_method("copy", "a", "b", RELATED)
    changed = [DISTANT, Verdict(0.27, 0.96, 0.44), Verdict(0.006, 0.99, 0.05, size=0.01)]
    assert "already fits" in fits
    for verdict in changed:
        told = tell_method("copy", "a", "b", verdict)
        assert "fits" not in told and "little" not in told


def test_a_report_and_advice_expect_the_same_of_auto():
    for method in ("copy", "damped"):
        rows = [make_row("a")]
        told = make_report(rows, method=method, asked="auto", verdict=CHANGED).in_words()
        auto = find_expected(CHANGED, 1.0, "auto")
        assert f"({auto.share:.0%})" in told.headline


def test_where_parts_have_no_place_the_next_step_is_to_run_both_models():
    assert "`method='best'`" in tell_next("damped", RELATED, 0.9, "t")
    assert "whole pipelines" in tell_next("damped", APART, 1.0, "t")
    assert "best" not in tell_next("copy", RELATED, 1.0, "t")


def test_of_distant_relatives_it_is_said_that_a_fit_does_more():
    assert "`fit()`" in tell_next("copy", DISTANT, 1.0, "t") and "far apart" in DISTANT.sentence()
    assert "fit()" not in tell_next("copy", RELATED, 1.0, "t")


def test_on_a_target_of_few_steps_the_next_step_may_be_a_fit():
    rows = [make_row("a")]
    for method in ("copy", "damped"):
        known = {"method": method, "asked": "auto", "verdict": RELATED}
        told = make_report(rows, **known, few_steps=True).in_words()
        assert "try `fit()`, which runs both models" in told.lines[-1]
        plain = make_report(rows, **known).in_words()
        assert "few steps" not in str(plain) and told.lines[-1].startswith(plain.lines[-1])
        why = "No fit was made: it would take a day."  # which says enough of fits
        assert "few steps" not in str(make_report(rows, **known, few_steps=True, why=why))
    for verdict, shown in ((FAR, rows), (APART, rows), (RELATED, None)):
        told = make_report(shown, asked="auto", verdict=verdict, few_steps=True)
        assert "few steps" not in str(told.in_words())


def test_nothing_is_made_up_for_a_method_that_nobody_measured():
    assert find_expected(RELATED, 1.0, "no such method") is None
    assert "xpect" not in judge(RELATED, 1.0, "t", "no such method")[1]


@pytest.mark.parametrize(("is_refused", "step"), [(True, "draw some images"), (False, "try it at")])
def test_a_fit_that_did_not_succeed_is_not_recommended(is_refused, step):
    told = tell_fit("a", "b", 0.1, is_refused, "", ())
    assert told.lines[-1].startswith(f"Next: {step}")


def test_of_a_lora_without_updates_only_what_is_known_is_said():
    zero, behind = [make_row("a", energy=0.0)], {"a.bias": f"{A_VECTOR}, left out as asked"}
    for rows, fields, mark, said in (
        ([], {"vectors": 1, "left_out": behind, "verdict": None}, "✔", "1 of 2 go over"),
        ([], {"vectors": 1, "verdict": APART}, "✖", "1 of 1 go over"),
        ([], {"left_out": behind}, "⚠", "0 of 1 go over"),
        (zero, {}, "⚠", "This LoRA changes nothing"),
        (zero, {"unread": ("a",)}, "⚠", "All that could be read"),
        (zero, {"left_out": {"emb": "an embedding"}}, "⚠", "All that could be read"),
    ):
        told = make_report(rows, **fields).in_words()
        assert told.mark == mark and said in told.headline, fields
    planned = make_report([], dry_run=True, left_out=behind).in_words()
    assert planned.mark == "⚠" and "0 of 1 go over" in planned.lines[0]
