"""Every error has a code by which programs know it."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import structure

import prolora
from prolora import ProLoRAError

PAGE = Path(__file__).parents[1] / "docs/errors.md"


def list_errors() -> list[type[ProLoRAError]]:
    """All kinds of error that the package defines; files without any are not imported."""
    found, classes = {"ProLoRAError": ProLoRAError}, []
    for file, tree in structure.parse_files().items():
        classes += [(file, node) for node in tree.body if isinstance(node, ast.ClassDef)]
    names = [0]
    while names:
        new = {
            node.name: importlib.import_module(".".join(("prolora", *file.with_suffix("").parts)))
            for file, node in classes
            if {ast.unparse(base) for base in node.bases} & found.keys()
        }
        names = [name for name in new if name not in found]
        found |= {name: getattr(module, name) for name, module in new.items()}
    return list(found.values())


def test_every_error_has_a_code_of_its_own_and_the_page_lists_it():
    errors = list_errors()
    assert all("code" in vars(kind) for kind in errors)
    assert len({kind.code for kind in errors}) == len(errors) > 15
    rows = re.findall(r"^\| `(\S+)` \| `(\w+)` \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    told = {(kind.code, kind.__name__, (kind.__doc__ or "").split("\n")[0]) for kind in errors}
    assert set(rows) == told and len(rows) == len(told)


def test_an_outcome_has_the_code_of_its_error(tmp_path):
    missing = prolora.errors.MissingFile("no such file")
    told = prolora.Outcome(tmp_path, tmp_path, error=missing).to_dict()
    assert told["error"] == {
        "type": "MissingFile",
        "code": "missing-file",
        "message": "no such file",
    }
