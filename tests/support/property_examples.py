"""How many examples a property is tried on: a quarter for every change, all of them at night."""

import os

AT_NIGHT = os.environ.get("PROLORA_EXAMPLES") == "all"


def examples(count: int) -> int:
    """Of `count`; derandomised, so that those of a change are always the same."""
    return count if AT_NIGHT else count // 4
