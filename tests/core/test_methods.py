"""One table says what a method is."""

from typing import get_args

import pytest

from prolora.core.methods import METHODS, MethodName, find_method


def test_the_types_name_the_methods_of_the_table():
    assert list(get_args(MethodName)) == list(METHODS) == [m.name for m in METHODS.values()]


def test_an_unknown_name_is_refused_with_the_names():
    assert find_method("prolora").needs_bases and not find_method("copy").needs_bases
    with pytest.raises(ValueError, match=r"choose from auto, prolora, copy$"):
        find_method("magic")
