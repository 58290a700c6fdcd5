"""One table says what a method is."""

from typing import get_args

import pytest

from prolora.core.methods import METHODS, MethodName, Needs, find_method


def test_the_types_name_the_methods_of_the_table():
    assert list(get_args(MethodName)) == list(METHODS)


def test_only_methods_that_look_at_nothing_or_bases_split_into_two_sides():
    for name, method in METHODS.items():
        assert method.name == name
        assert (method.split is not None) == (method.needs in (Needs.NOTHING, Needs.BASES))
        assert method.keeps_rank == (method.rank_factor == 1)


def test_an_unknown_name_is_refused_with_the_names():
    assert find_method("copy").needs is Needs.NOTHING
    with pytest.raises(ValueError, match="choose from auto, prolora, subspace"):
        find_method("magic")
