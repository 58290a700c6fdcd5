"""Imports run down the list of rooms only, and the mathematics can be lifted out."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import structure

import prolora

PACKAGE = Path(prolora.__file__).parent
# From the top down. Rooms on one line do not know each other.
ROOMS = [
    {"cli"},
    {"workflow"},
    {"probe", "comparison"},
    {"adapters", "bases"},
    {"files"},
    {"errors"},
    {"architectures", "core"},
]
# Imports nothing of prolora, and may be imported by everybody.
LEAVES = {"version"}


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(ROOMS) if room in rooms)


def imported_modules(file: Path) -> set[str]:
    """The modules of prolora that a file imports, as paths below the package."""
    package = file.relative_to(PACKAGE).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            path = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            modules |= {path} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prolora":
            modules.add(node.module.removeprefix("prolora").strip("."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "prolora"]
            modules |= {name.removeprefix("prolora").strip(".") for name in names}
    return {module for module in modules if module}


@pytest.mark.parametrize("room", sorted(set().union(*ROOMS) - {"errors"}))
def test_imports_run_down_the_list_of_rooms_only(room):
    upwards = []
    for file in sorted((PACKAGE / room).rglob("*.py")):
        for module in imported_modules(file):
            other = module.split(".")[0]
            if other in LEAVES or other == room:
                continue
            if level_of(other) <= level_of(room):
                upwards.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert not upwards


def test_the_top_of_the_package_holds_the_rooms_and_little_else():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "icon_family"}
    rooms = set().union(*ROOMS) - {"errors"}
    assert entries == rooms | {"__init__.py", "__main__.py", "errors.py", "version.py", "py.typed"}


def test_the_mathematics_can_be_lifted_out_and_used_alone(tmp_path):
    shutil.copytree(PACKAGE / "core", tmp_path / "lifted" / "core")
    (tmp_path / "lifted" / "__init__.py").write_text("")
    code = """
import sys, torch
from lifted.core.basis import truncated_svd
from lifted.core.projection import project
from lifted.core.similarity import similarity
source, target = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))
factors = torch.randn(64, 4), torch.randn(4, 48)
moved = project(factors, source, target, rank=16)
assert moved.rank <= 8 and truncated_svd(source, 16).ok
assert 0 <= float(similarity(source, target, rank=16).left) <= 1
assert not any(name == "prolora" or name.startswith("prolora.") for name in sys.modules)
"""
    path = [str(tmp_path)]
    run = f"import sys; sys.path[:0] = {path!r}\n{code}"
    subprocess.run([sys.executable, "-c", run], check=True, cwd=tmp_path, env=environment())


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


# What is left of the time before these rules were tests; nothing may be added.
LEFT_OVER = {
    "wide": {},
    "long": set(),
    "twice": set(),
    "circles": [("adapters/adapter.py", "adapters/reading.py")],
}


@pytest.fixture(scope="module")
def trees():
    return structure.parse_files(PACKAGE)


def test_no_class_or_public_function_has_the_name_of_another(trees):
    assert structure.find_names_told_twice(trees).keys() == LEFT_OVER["twice"]


def test_signatures_and_functions_stay_small(trees):
    assert not structure.find_wide_signatures(trees)
    assert not structure.find_long_functions(trees)


def test_files_do_not_import_each_other_in_circles(trees):
    assert [tuple(circle) for circle in structure.find_circles(trees)] == LEFT_OVER["circles"]


def test_the_stages_of_a_transfer_and_the_rows_of_its_report_have_one_home(trees):
    assert structure.find_planners(trees) == ["workflow/by_weights/base_pair.py:plan"]
    writers = {name.partition(":")[0] for name in structure.find_row_writers(trees)}
    assert writers <= {
        "workflow/by_weights/ledger.py",
        "workflow/by_weights/rows.py",
        "workflow/by_fitting/pipeline.py",
        "workflow/by_fitting/rows.py",
    }


def test_docstrings_say_more_than_the_name(trees):
    assert not structure.find_restating_docstrings(trees)


def test_flags_of_the_command_line_are_named_there_alone(trees):
    """Errors and reports reach people in Python and in ComfyUI, who have no flags."""
    assert not structure.find_flags(trees)
