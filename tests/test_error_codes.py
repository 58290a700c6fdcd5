"""Every error has a code by which programs know it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import prolora
from prolora import ProLoRAError

PAGE = Path(__file__).parents[1] / "docs/errors.md"


def list_errors() -> list[type[ProLoRAError]]:
    """All kinds of error that the package defines."""
    for module in pkgutil.walk_packages(prolora.__path__, "prolora."):
        if not module.name.endswith("__main__") and "._" not in module.name:
            importlib.import_module(module.name)
    found, new = [], [ProLoRAError]
    while new:
        found.append(new.pop())
        new += found[-1].__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("prolora.")]


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
