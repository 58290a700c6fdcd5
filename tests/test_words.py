"""`tests/support/words.py` counts the words of docstrings and comments, and no others."""

import words

PYTHON = '''#!/usr/bin/env python
"""Tells what a file is, for
example a LoRA."""

NAME = "what where alone"  # where it lies alone, such as here
# What is told beside it, e.g. this.


def what_function(where):
    """Returns what it tells: "where"."""
    return f"told {where} # beside"
'''
CPP = """// what is told // where
/* alone,
 * such as this */
const char* what = "http://where"; // beside
char quote = '"'; // tell
#include "told.h"
"""


def test_docstrings_and_comments_of_python_are_counted():
    counts = words.count_words(words.read_python(PYTHON))
    assert counts == {
        **{"what": 2, "where": 2, "alone": 1, "beside": 1, "told": 2, "example": 3},
        # usr bin env python, 9 and 5 of docstrings, 7 and 8 of comments
        "words": 4 + 9 + 5 + 7 + 8,
    }


def test_comments_of_cpp_are_counted():
    counts = words.count_words(words.read_cpp(CPP))
    assert counts == {
        **{"what": 1, "where": 1, "alone": 1, "beside": 1, "told": 2, "example": 1},
        "words": 4 + 4 + 1 + 1,
    }


def test_table_prints_rates_per_thousand_words_of_each_folder(tmp_path):
    for name, text in {
        "python/prolora/core/__init__.py": "# " + "what " * 3 + "word " * 497,
        "python/prolora/core/svd/dense.py": "# where " + "word " * 499,
        "python/prolora/best.py": "# " + "alone " * 2 + "word " * 998,
        "csrc/ops.h": "// told " + "word " * 249,
        "tests/test_x.py": "what = 1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    _, *rows = words.format_table(words.list_rows(tmp_path)).splitlines()
    assert [row.split() for row in rows] == [
        ["core/", "1000", "3.00", "1.00", "0.00", "0.00", "0.00", "0.00"],
        ["*.py", "1000", "0.00", "0.00", "2.00", "0.00", "0.00", "0.00"],
        ["python/prolora", "2000", "1.50", "0.50", "1.00", "0.00", "0.00", "0.00"],
        ["csrc", "250", "0.00", "0.00", "0.00", "0.00", "4.00", "0.00"],
        ["tests", "0", "0.00", "0.00", "0.00", "0.00", "0.00", "0.00"],
        ["bench", "0", "0.00", "0.00", "0.00", "0.00", "0.00", "0.00"],
    ]
