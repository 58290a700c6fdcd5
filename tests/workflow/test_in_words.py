"""The verdict in words: a mark, what to expect, what was done; no word of the mathematics."""

import re

import pytest
from reports import make_report, make_row

from prolora import Verdict
from prolora.comparison.expectation import expect_shares
from prolora.workflow.in_words import judge, name_amount, tell_expected

MATHS = re.compile(r"energy|coverage|module|drift|cosine|norm\b|Φ|κ|update|subspace|basis|--")

RELATED, FAR, APART = Verdict(0.1, 0.99, 0.05), Verdict(0.6, 0.95, 0.2), Verdict(1.4, 0.0, 0.1)


@pytest.mark.parametrize(
    ("verdict", "placed", "mark", "said"),
    [
        (RELATED, 1.0, "✔", "closely related (their weights differ by 10%)"),
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
@pytest.mark.parametrize("verdict", [RELATED, FAR, APART, None])
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


def test_what_to_expect_comes_from_measured_pairs_and_is_not_made_up():
    expected = expect_shares(0.13, 0.18)
    said = tell_expected(expected, "damped", "t")
    auto = next(x for x in expected if x.method == "auto" and x.want == "look")
    assert f"({auto.share:.0%})" in said and f"{auto.low:.0%} to {auto.high:.0%}" in said
    assert tell_expected((), "damped", "t") == ""
    assert tell_expected(expected, "no such method", "t") == ""
