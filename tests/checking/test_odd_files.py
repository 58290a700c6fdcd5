"""Odd files get one mark and one sentence, in Python, in a terminal and on the page."""

import pytest
from odd_files import ODD_FILES, check_on_page

from prolora import ProLoRAError
from prolora.checking.check import check


def ask_python(path, asked):
    try:
        found = check(path, **asked)
    except ProLoRAError as error:
        return "✖", str(error).removeprefix(f"{path}: ")
    return found.mark, found.headline


@pytest.mark.parametrize("odd", ODD_FILES, ids=lambda odd: odd.name)
def test_python_and_the_page_say_of_an_odd_file_what_the_table_has(odd, tmp_path):
    path = odd.write(tmp_path)
    mark, first = ask_python(path, odd.asked)
    assert (mark, first[: len(odd.first)]) == (odd.mark, odd.first)
    if "deep" not in odd.asked:  # the page reads headers alone
        marked, line = check_on_page(path, odd.asked.get("program", ""))
        assert (marked, line[: len(odd.first)]) == (odd.mark, odd.first)
