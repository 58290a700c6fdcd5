"""Characters that have no place in a message or a page."""

from __future__ import annotations

import re

# C0 and C1 controls, marks of direction, line and
# paragraph separators, half characters, and what Unicode says is no character.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)


def replace_controls(text: str) -> str:
    r"""Replaces control characters by `\x1b` and the like; tabs and newlines stay.

    Texts from files are in messages: a tensor's name may clear the reader's terminal or forge a
    line of a log.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
