"""What docstrings cite of docs exists there, and what docs link to exists as well."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in plain}


def test_sections_cited_in_the_package_exist():
    missing = []
    for file in sorted((ROOT / "python").rglob("*.py")):
        for page, section in re.findall(r"docs/(\w+\.md) §(\d+)", file.read_text("utf-8")):
            text = (ROOT / "docs" / page).read_text("utf-8")
            if not re.search(rf"^## {section}\. ", text, re.MULTILINE):
                missing.append(f"{file.name}: {page} §{section}")
    assert not missing


def test_pages_cited_in_the_package_exist():
    cited = set()
    for file in (ROOT / "python").rglob("*.py"):
        cited |= set(re.findall(r"docs/\w+\.md", file.read_text("utf-8")))
    assert cited
    assert not [page for page in cited if not (ROOT / page).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken
