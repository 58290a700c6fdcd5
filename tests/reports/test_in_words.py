"""The verdict in words: a mark, what to expect, what was done; no word of the mathematics."""

import re

import pytest
from reports import make_report, make_row

from prolora.core.verdict import PairVerdict
from prolora.moving.transfer_report import A_VECTOR, judge, name_amount

MATHS = re.compile(r"energy|coverage|module|drift|cosine|norm\b|Φ|κ|update|subspace|basis|--")

RELATED, CHANGED = PairVerdict(0.1, 0.99, size=0.3), PairVerdict(0.15, 0.99)
DISTANT, APART = PairVerdict(0.9, 0.8), PairVerdict(1.4, 0.0)
NAMES = ("s", "t")


@pytest.mark.parametrize(
    ("verdict", "placed", "few_steps", "mark", "said", "advice"),
    [
        (RELATED, 1.0, False, "✔", "This should work", "at strength 1."),
        (RELATED, None, False, "✔", "This should work", "at strength 1."),
        (RELATED, 1.0, None, "✔", "This should work", "`target_steps=4`"),
        (RELATED, 0.2, False, "⚠", "most of this LoRA belongs to parts that t lacks", "best"),
        (CHANGED, 1.0, False, "⚠", "may work or not: s and t have learnt", "try 0.5 and 0.8"),
        (DISTANT, 1.0, True, "⚠", "t draws in few steps", "at strength 1 to 1.25"),
        (RELATED, 0.9, False, "⚠", "t lacks parts", "`method='best'`"),
        (RELATED, 1.0, True, "⚠", "t draws in few steps", "at strength 1 to 1.25"),
        (DISTANT, 1.0, False, "⚠", "may work or not: s and t are far apart", "`fit()`"),
        (APART, 1.0, False, "✖", "nothing in common", "train it on t"),
        (PairVerdict(0.0, 1.0), 1.0, False, "✔", "works as it is", "at strength 1."),
        (None, 1.0, False, "⚠", "were not compared", ""),
    ],
)
def test_a_mark_says_how_it_stands_and_the_next_line_which_strengths_to_try(
    verdict, placed, few_steps, mark, said, advice
):
    told = judge(verdict, placed, NAMES, few_steps)
    assert told.mark == mark and said in told.headline
    assert advice in " ".join(told.lines[:1])


def test_harm_is_called_harm_and_only_a_range_that_held_has_numbers():
    told = " ".join(judge(CHANGED, 1.0, NAMES).lines)
    assert "got worse than without it" in told and "%" not in told
    told = " ".join(judge(RELATED, 1.0, NAMES).lines)
    assert "brought 82% to 99% of what training on the target gives." in told
    assert "got worse" not in told


def copy_row(source, **known):
    return make_row(source, **{"rank_out": 32, "norm_ratio": 1.0} | known)


def test_a_file_that_needs_no_change_is_said_to_work_as_it_is():
    rows, known = [copy_row("a"), copy_row("b")], {"method": "copy", "verdict": RELATED}
    report = make_report(rows, **known)
    assert "The file works on ssd-1b as it is." in report.in_words().lines
    assert report.to_dict()["works_as_it_is"] is True
    line = "The file works on ssd-1b as it is: nothing in it had to change."
    assert line in make_report(rows, method="copy", verdict=CHANGED).in_words().lines
    for changed, others in (
        ([copy_row("a", target="b")], {}),
        ([copy_row("a", rank_out=4)], {}),
        ([copy_row("a"), make_row("b", "skipped", reason="no place")], {}),
        (rows, {"left_out": {"emb": "an embedding"}}),
        (rows, {"strength": 0.5}),
        (rows, {"method": "prolora"}),
        (rows, {"blocks": "up=0.5"}),
        (rows, {"dry_run": True, "verdict": None}),
        (rows, {"verdict": APART}),
    ):
        report = make_report(changed, **known | others)
        assert not report.works_as_it_is and "as it is" not in str(report.in_words()), others


def test_a_target_that_only_its_name_calls_few_step_is_asked_about_and_given_no_strength():
    told = make_report(
        method="copy", verdict=CHANGED, few_by_name=True, target="x-turbo"
    ).in_words()
    line = "By its name, x-turbo draws in few steps: if so, set `target_steps=4`."
    assert line in told.lines and "1.25" not in str(told) and "which its files" not in str(told)


def test_what_could_not_be_read_is_in_the_headline_and_not_in_the_share():
    rows = [copy_row("a"), make_row("b", "refused", reason="its file is damaged", energy=0.0)]
    told = make_report(rows, unread=("b",), method="copy", verdict=RELATED).in_words()
    assert told.mark == "⚠" and told.headline == "1 of the LoRA's 2 parts could not be read."
    assert "1 of the LoRA's 2 parts have a place on" in str(told) and "100%" not in str(told)


def test_nothing_is_promised_of_another_method_or_strength():
    for known in ({"method": "prolora"}, {"method": "copy", "strength": 0.5}):
        told = str(make_report(**known, asked=known["method"], verdict=CHANGED).in_words())
        assert "small test models" not in told and "0.8" not in told


@pytest.mark.parametrize("method", ["copy", "prolora"])
@pytest.mark.parametrize("verdict", [RELATED, CHANGED, DISTANT, APART, None])
def test_no_line_of_the_verdict_needs_the_mathematics(method, verdict):
    report = make_report(method=method, asked="auto", verdict=verdict)
    told = report.in_words()
    for line in (told.headline, *told.lines):
        assert not MATHS.search(line.replace("weights", "")), line
        assert line[0].isupper() or line.startswith("prolora")
        assert line.endswith(".")
    assert 1 <= len(told.lines) <= 4


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


def test_shares_have_names():
    names = {
        1.2: "All",
        0.9: "Most",
        0.66: "About two thirds",
        0.5: "About half",
        0.0: "Very little",
    }
    assert {share: name_amount(share) for share in names} == names


def test_of_a_lora_without_updates_only_what_is_known_is_said():
    zero, behind = [make_row("a", energy=0.0)], {"a.bias": f"{A_VECTOR}, left out as asked"}
    for rows, fields, mark, said in (
        ([], {"vectors": 1, "left_out": behind, "verdict": None}, "⚠", "1 of 2 go over"),
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
