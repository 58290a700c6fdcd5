"""Sentences that readers stumble over: what CONTRIBUTING's section on English asks to avoid.

    python tests/support/english.py        # the sentences
    pytest tests/test_english.py           # the rule

Read are the messages of the package (no docstrings) and the pages of the documentation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import structure

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Written from docstrings, and a list of what was true when it was written.
LEFT_ALONE = {"api.md", "CHANGELOG.md"}

PATTERNS = {
    "says that there is none; say what is missing": r"\bthere is none\b",
    "gives weights a will; say what they show": (
        r"\b(?:weights?|bases|blocks) (?:have|has) nothing to say\b|\bfeeds? none\b"
    ),
    "'is no X'; write 'is not an X'": (
        r"(?<![Tt]here )\b(?:is|are) no (?!longer|more|better|less|other|such|need|way|room)\w+\b"
    ),
    "begins with 'Of'; begin with the subject": r"(?:^|[.;:!?] )Of (?:a|an|the|several|two|all)\b",
    "is wit; say the fact": r"\bnobody's business\b|\bmatters to nobody\b|\bmeans anything to\b",
}


def find_patterns(text: str) -> list[str]:
    """What is wrong with a text, each with the words that show it."""
    found = []
    for what, pattern in PATTERNS.items():
        found += [f"{match[0].strip()!r} {what}" for match in re.finditer(pattern, text, re.M)]
    return found


@cache
def list_messages() -> list[tuple[str, str]]:
    """(place, text) of every text of the package that is no docstring; f-strings as a whole."""
    found = []
    for file, tree in structure.parse_files().items():
        docs = {id(node.value) for node in structure.walk(tree) if isinstance(node, ast.Expr)}
        inside = {
            id(part)
            for node in structure.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in structure.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "X" for p in node.values]
                found.append((f"{file}:{node.lineno}", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in docs | inside:
                    found.append((f"{file}:{node.lineno}", node.value))
    return found


def list_paragraphs() -> Iterator[tuple[str, str]]:
    """(place, text) of every paragraph of the documentation, without code and quotations."""
    for page in PAGES:
        if page.name in LEFT_ALONE:
            continue
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        for part in re.split(r"\n\s*\n", text):
            plain = re.sub(r"`[^`]*`", "`code`", re.sub(r'"[^"]*"', '"quoted"', part))
            yield page.name, " ".join(plain.split())


def list_stumbles() -> list[str]:
    """Every place and what is wrong there."""
    places = [*list_messages(), *list_paragraphs()]
    return [f"{place}: {what}" for place, text in places for what in find_patterns(text)]


if __name__ == "__main__":
    print(*list_stumbles(), sep="\n")
