"""Tables in Markdown."""

from __future__ import annotations

from results import Mean


def format_cell(mean: Mean | None) -> str:
    """0.57 [0.50, 0.63], or a dash."""
    return "–" if mean is None else f"{mean[0]:.2f} [{mean[1]:.2f}, {mean[2]:.2f}]"


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
