"""Patterns of file names on a command line."""

from __future__ import annotations

import os
import re
from glob import glob


def expand_patterns(words: list[str]) -> list[str]:
    """Expands `*`, `?` and a first `~` as shells other than Windows' do.

    Brackets, `$` and `%` belong to names there, and are no pattern.
    """
    expanded: list[str] = []
    for word in words:
        path = os.path.expanduser(word) if re.match(r"~($|[\\/])", word) else word
        is_pattern = re.search(r"[*?]", path) is not None
        there = glob(path.replace("[", "[[]"), recursive=True) if is_pattern else []
        expanded += sorted(there) or [path]
    return expanded
