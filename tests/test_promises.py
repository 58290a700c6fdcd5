"""What pages and public docstrings promise has a test, which `promises.json` names."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
from checkout import list_files

ROOT = Path(__file__).parents[1]
TABLE = json.loads((ROOT / "tests" / "promises.json").read_text("utf-8"))
# Records of measurements, whose numbers have scripts; what others did.
RECORDS = {"evidence.md", "results.md", "related_work.md"}
DOCS = [file for file in list_files() if file.suffix == ".md" and file.parent == ROOT / "docs"]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *DOCS]
# When an error is raised, and which there are.
ERRORS = re.compile(r"- `\w+` – |\| `[\w-]+` \| `\w+` \|")
PROMISE = re.compile(r"\b(?:always|never|every|(?<!at )once|no)\b", re.IGNORECASE)


@cache
def list_sentences(page: Path) -> list[str]:
    """Sentences of a page, and rows of its tables; no code, and nothing that a program wrote."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!-- (?:made|written) by.*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?=[ \t]*(?:\||[-*] |\d+\. |#))", "\n\n", text, flags=re.MULTILINE)
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [one for part in parts for one in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*\[(“])", part)]


@cache
def list_tests(file: Path) -> set[str]:
    """Names of the test functions of a file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    body = ast.parse(file.read_text("utf-8")).body
    return {node.name for node in body if isinstance(node, functions)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_promise_of_a_page_has_a_test(page):
    name = page.relative_to(ROOT).as_posix()
    promises, others = TABLE["tests"].get(name, {}), TABLE["no promise"].get(name, [])
    text = " ".join(page.read_text("utf-8").split())
    assert not [one for one in [*promises, *others] if one not in text], "not on the page"
    assert all(map(PROMISE.search, others)), "needs no entry"
    missing = []
    for test in promises.values():
        file, _, function = test.partition("::")
        if not (ROOT / file).is_file() or function not in list_tests(ROOT / file):
            missing.append(test)
    assert not missing, "no such test"
    known = [" ".join(one.split()) for one in [*promises, *others]]
    new = [
        sentence
        for sentence in ([] if page.name in RECORDS else list_sentences(page))
        if PROMISE.search(sentence)
        and not ERRORS.match(sentence)
        and not any(one in sentence for one in known)
    ]
    assert not new, "a promise without a test: name it in tests/promises.json, or say less"


def test_a_new_promise_is_seen():
    said = list_sentences(ROOT / "SECURITY.md")
    assert any("follow a path or link in it out of the folder" in sentence for sentence in said)
    assert PROMISE.search("It never does.") and not PROMISE.search("all at once, now")


def test_every_chosen_mutant_stands_once_in_its_file_and_names_tests_that_exist():
    for mutant in json.loads((ROOT / "tests/attack/mutants.json").read_text("utf-8"))["chosen"]:
        assert (ROOT / mutant["file"]).read_text("utf-8").count(mutant["old"]) == 1, mutant
        assert all((ROOT / name).is_file() for name in mutant["tests"]), mutant
