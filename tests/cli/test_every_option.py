"""No value of any option, and of no keyword, ends in anything but a result or a sentence."""

from pathlib import Path
from random import Random

import pytest
from property_examples import AT_NIGHT

SAMPLE = 5000 if AT_NIGHT else 90
"""How many of some 7,000 values are tried; `python tests/attack options` tries all."""


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "attack"))
    monkeypatch.chdir(tmp_path)
    import options_values

    options_values.write_files(tmp_path)
    return options_values


def test_no_value_of_a_keyword_ends_in_a_bare_error(options, tmp_path):
    cases = [(*one, thing) for one in options.list_keywords() for thing in options.THINGS]
    for name, keyword, thing in Random(0).sample(cases, min(SAMPLE, len(cases))):
        found = options.try_keyword(tmp_path, name, keyword, thing)
        assert found in ("done", "refused"), (name, keyword, thing)


def test_no_value_of_an_option_ends_in_a_traceback_or_another_code(options, tmp_path):
    cases = list(options.list_words())
    for case in Random(0).sample(cases, min(SAMPLE // 3, len(cases))):
        assert options.try_word(tmp_path, *case) in ("done", "refused"), case


@pytest.mark.parametrize(
    ("name", "keyword", "thing"),
    [
        ("transfer", "cache", 0.5),
        ("transfer", "match", 0.5),
        ("transfer", "again", float("nan")),
        ("transfer", "progress", "x"),
        ("convert", "alpha", 5e-324),
        ("bake", "stochastic", 0.5),
        ("check", "program", 1),
        ("fit_many", "resume", 0.5),
        ("fit", "pictures", "9" * 5000),
    ],
)
def test_a_value_of_another_type_is_answered_with_what_the_option_takes(
    options, tmp_path, name, keyword, thing
):
    assert options.try_keyword(tmp_path, name, keyword, thing) in ("done", "refused")
