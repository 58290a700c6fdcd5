"""Pages and docstrings point at what exists."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends import find_node
from checkout import add_stray_files, list_files, run_git

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "prolora"
FILES = list_files()
PAGES = [p for p in FILES if p.suffix == ".md" and p.parent in (ROOT, ROOT / "docs")]


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


def test_every_file_that_the_table_of_rooms_names_exists():
    table = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|(.*)$", table, re.MULTILINE)
    missing = [
        f"{room}/{name}"
        for room, text in rows
        for name in re.findall(r"`([\w/]+(?:\.py|\.h|\.cpp|/))", text)
        if not any((folder / room / name).exists() for folder in (PACKAGE, ROOT))
    ]
    assert len(rows) > 8
    assert not missing


def test_nobody_is_sent_to_a_package_that_is_not_ours():
    """What an index has under this project's name is another's."""
    files = [*(ROOT / "python").rglob("*.py"), *(file for file in FILES if file.suffix == ".md")]
    sent = [f for f in files if re.search(r"pip install .?prolora", f.read_text("utf-8"))]
    assert len(files) > 100 and not sent


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_stray_files_are_not_files_of_the_project(tmp_path):
    for name in ("README.md", "docs/guide.md", "docs/gone.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    add_stray_files(tmp_path)
    readme, gone, guide = (tmp_path / x for x in ("README.md", "docs/gone.md", "docs/guide.md"))
    assert list_files(tmp_path) == [readme, gone, guide]  # an unpacked source distribution
    run_git(tmp_path, "init", "--quiet")
    run_git(tmp_path, "add", "README.md", "docs")
    gone.unlink()
    assert list_files(tmp_path) == [readme, guide]
    run_git(tmp_path, "add", "notes.md")
    assert list_files(tmp_path) == [readme, guide, tmp_path / "notes.md"]


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_changelog_begins_with_the_version_that_is_not_released():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution holds no .ci")
def test_ci_runs_the_commands_of_the_readme_and_installs_nothing_beside_them():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for heading, command in (("Try it", "prolora demo"), ("Develop", "&& pytest")):
        block = re.search(rf"\n## {heading}\n.*?```bash\n(.*?)```", readme, re.DOTALL)
        assert block and command in block[1] and "\n## " not in block[0][1:]
        assert re.search(rf'^readme "?{heading}"? >', script, re.MULTILINE)
    assert "apt-get" not in script


@pytest.mark.parametrize("name", ["doctor/worker.js", "filter.js"])
def test_the_scripts_of_pages_for_browsers_can_be_read(name):
    script = (ROOT / "docs" / name).read_bytes()
    subprocess.run([find_node(), "--check", "--input-type=module", "-"], input=script, check=True)


def check_page(script, monkeypatch):
    """`python docs/SCRIPT --check` in this process, which has imported what it needs."""
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")


def test_the_page_of_families_says_what_their_files_say_and_who_reads_them(monkeypatch):
    """`python docs/make_families.py` writes it."""
    check_page("make_families.py", monkeypatch)


@pytest.mark.skipif(not (ROOT / "bench" / "results").exists(), reason="a source distribution")
def test_the_page_of_attacks_says_what_the_last_night_found():
    """`python docs/make_attacks.py` writes it."""
    subprocess.run([sys.executable, ROOT / "docs" / "make_attacks.py", "--check"], check=True)
