#!/usr/bin/env python3
"""The tests that the changes since a revision can reach, one a line; none where all are reached.

A change of a room reaches its own tests and those of every room above it in tests/test_rooms.py;
what tests borrow reaches those that import it; pages, benches and the stub reach the tests beside
the rooms, which always run; anything else reaches all.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (".md", ".png", ".svg", ".html", ".js", ".yml", ".pyi")


def list_rooms() -> list[str]:
    """Reads the rooms, the uppermost first."""
    tree = ast.parse((ROOT / "tests" / "test_rooms.py").read_text("utf-8"))
    value = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS"
    )
    return [room for level in ast.literal_eval(value) for room in sorted(level)]


def find_borrowers(stem: str) -> set[str]:
    """Returns folders of tests that import a file of tests/support, perhaps through another one."""
    pattern = re.compile(rf"^ *(?:from|import) {stem}\b", re.MULTILINE)
    files = [f for f in (ROOT / "tests").rglob("*.py") if pattern.search(f.read_text("utf-8"))]
    folders = {file.relative_to(ROOT / "tests").parts[0] for file in files}
    through = [file.stem for file in files if file.parent.name == "support"]
    return (folders - {"support"}).union(*map(find_borrowers, through))


def reach_tests(changed: list[str], rooms: list[str]) -> set[str] | None:
    """Returns folders of tests that a change reaches; None stands for all of them."""
    reached: set[str] = set()
    for path in changed:
        top, name, *_ = f"{path}/".split("/")
        if path.startswith("python/prolora/") and not path.endswith(".pyi"):
            room = path.split("/")[2].removesuffix(".py")
            if room not in rooms:
                return None
            reached |= {"integrations", *rooms[: rooms.index(room) + 1]}
        elif path.startswith("tests/support/") and path.endswith(".py"):
            reached |= find_borrowers(Path(path).stem)
        elif top == "integrations" or (top == "tests" and name in rooms):
            reached.add(name if top == "tests" else top)
        elif not (
            top == "bench" or path.endswith(PAGES) or (top == "tests" and name.startswith("test_"))
        ):
            return None
    return {f"tests/{name}" for name in reached if (ROOT / "tests" / name).is_dir()}


def list_changes(revision: str) -> list[str]:
    """Lists the files that differ from a revision, and the new ones in tracked folders."""
    commands = ["diff", "--name-only", revision], ["ls-files", "--others", "--exclude-standard"]
    changed, new = (
        subprocess.check_output(["git", *words], cwd=ROOT, text=True).splitlines()
        for words in commands
    )
    # A venv, a notebook or an output in the root is not a change of the project.
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    folders = {path.partition("/")[0] for path in tracked if "/" in path}
    return changed + [path for path in new if path.partition("/")[0] in folders]


if __name__ == "__main__":
    tests = reach_tests(list_changes(sys.argv[1]), list_rooms())
    beside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py")}
    print(*sorted(tests | beside if tests is not None else ()), sep="\n", end="")
