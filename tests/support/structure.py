"""What the structure of the package measures, and which of its rules are broken.

    python tests/support/structure.py [FOLDER]     # the sizes, of another tree too
    pytest tests/test_rooms.py                     # the rules

Only sources are read; nothing is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "prolora"
MOST_PARAMETERS, MOST_LINES, MOST_STARRED = 8, 80, 2
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# The dense definitions, each with the name of the op that it defines.
TWINS = "core/reference.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse_file(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text("utf-8"))


@cache
def walk(node: ast.AST) -> tuple[ast.AST, ...]:
    """Its nodes; every rule asks for them anew."""
    return tuple(ast.walk(node))


def parse_files(package: Path = PACKAGE) -> dict[Path, ast.Module]:
    """Path below the package -> its syntax tree."""
    return {file.relative_to(package): parse_file(file) for file in sorted(package.rglob("*.py"))}


def find_duplicate_names(trees: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """Returns class or public function -> the files that define it, if these are several.

    Two pairs are allowed: a command and the verb that it calls, for example `cli/merge.py` and
    `making/merge.py`, and an op in `core/` and its dense definition in `core/reference.py`.
    """
    homes: dict[str, set[str]] = defaultdict(set)  # a set, since overloads have one name
    for file, tree in trees.items():
        for node in tree.body:
            is_public = isinstance(node, Function) and not node.name.startswith("_")
            if isinstance(node, ast.ClassDef) or is_public:
                homes[node.name.lstrip("_")].add(file.as_posix())
    duplicates = {}
    for name, files in homes.items():
        if any(file.startswith("core/") for file in files - {TWINS}):
            files = files - {TWINS}
        if len(files) > 1 + _is_command(sorted(files)):
            duplicates[name] = sorted(homes[name])
    return duplicates


def _is_command(files: list[str]) -> bool:
    """Returns True for two files of which one is in cli/."""
    return [file.startswith("cli/") for file in files].count(True) == 1 == len(files) - 1


def _walk_functions(tree: ast.Module) -> Iterator[Function]:
    yield from (node for node in walk(tree) if isinstance(node, Function))


def find_wide_signatures(trees: dict[Path, ast.Module]) -> dict[str, int]:
    """Function -> its parameters, where these are too many; self and cls do not count."""
    wide = {}
    for file, tree in trees.items():
        for node in _walk_functions(tree):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            count = len([n for n in names if n not in ("self", "cls")]) + len(node.args.kwonlyargs)
            if count > MOST_PARAMETERS:
                wide[f"{file}:{node.name}"] = count
    return wide


def find_long_functions(trees: dict[Path, ast.Module]) -> dict[str, int]:
    """Function -> its lines, docstring left out, where these are too many."""
    long = {}
    for file, tree in trees.items():
        for node in _walk_functions(tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            if lines > MOST_LINES:
                long[f"{file}:{node.name}"] = lines
    return long


def find_starred_calls(trees: dict[Path, ast.Module]) -> list[str]:
    """Calls that pass a starred name for more than two positional arguments.

    Such a tuple hides which argument is which. Functions that take `*args` are left out.
    """
    wanted = _count_wanted_arguments(trees)
    starred = set()
    functions = ((file, x) for file, tree in trees.items() for x in _walk_functions(tree))
    for file, function in functions:
        sizes = {
            ast.unparse(node.targets[0]): len(node.value.elts)
            for node in walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        }
        for call in (node for node in walk(function) if isinstance(node, ast.Call)):
            values = [x.value for x in call.args if isinstance(x, ast.Starred)]
            names = [value.id for value in values if isinstance(value, ast.Name)]
            callee = getattr(call.func, "attr", getattr(call.func, "id", ""))
            left = wanted.get(callee, 0) - (len(call.args) - len(names)) - len(call.keywords)
            if names and max(left, *(sizes.get(name, 0) for name in names)) > MOST_STARRED:
                starred.add(f"{file}:{call.lineno} {ast.unparse(call)}")
    return sorted(starred)


def _count_wanted_arguments(trees: dict[Path, ast.Module]) -> dict[str, int]:
    """Function or class -> arguments that it must be given; the fewest where a name has several."""
    wanted: dict[str, int] = {}
    for tree in trees.values():
        for node in walk(tree):
            if isinstance(node, ast.ClassDef):
                count = sum(isinstance(x, ast.AnnAssign) and x.value is None for x in node.body)
            elif isinstance(node, Function):
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args)]
                names = [name for name in names if name not in ("self", "cls")]
                count = 0 if node.args.vararg else len(names) - len(node.args.defaults)
            else:
                continue
            wanted[node.name] = min(count, wanted.get(node.name, count))
    return wanted


def find_flags(trees: dict[Path, ast.Module]) -> list[str]:
    """Texts outside cli/ that name a flag of the command line; docstrings count too."""
    named = []
    for file, tree in trees.items():
        if file.parts[0] == "cli":
            continue
        for node in walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named += [f"{file}:{node.lineno} {flag}" for flag in FLAG.findall(node.value)]
    return named


@cache
def list_imports(file: Path, package: Path = PACKAGE) -> frozenset[Path]:
    """The files below the package that a file imports anywhere, for types too."""
    imported: set[Path] = set()
    for node in walk(parse_file(file)):
        if isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else package.parent
            bases = [start.joinpath(*(node.module or "").split("."))]
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            bases = [package.parent.joinpath(*alias.name.split(".")) for alias in node.names]
            names = []
        else:
            continue
        for base in bases:
            modules = [f"{base}.py", *(base / f"{name}.py" for name in names)]
            modules += [base / name / "__init__.py" for name in names]
            # A package's own names come from its __init__, its modules do not need it.
            found = [Path(m) for m in modules if Path(m).is_file()] or [base / "__init__.py"]
            imported |= {
                path.relative_to(package) for path in found if path.is_relative_to(package)
            }
    return frozenset(
        path for path in imported if (package / path).is_file() and package / path != file
    )


def find_circles(trees: dict[Path, ast.Module]) -> list[list[str]]:
    """Groups of files that import each other, one way or another."""
    edges = {file: list_imports(PACKAGE / file) for file in trees}
    reach: dict[Path, set[Path]] = {}
    for file in trees:
        seen, stack = set(), list(edges[file])
        while stack:
            other = stack.pop()
            if other not in seen:
                seen.add(other)
                stack += edges[other]
        reach[file] = seen
    circles = {
        tuple(sorted(str(f) for f in trees if f == file or (f in reach[file] and file in reach[f])))
        for file in trees
        if file in reach[file]
    }
    return [list(circle) for circle in sorted(circles)]


def find_row_writers(trees: dict[Path, ast.Module]) -> list[str]:
    """Functions that make a row of a report, or change one: `replace(row, …)`."""
    writers = []
    for file, tree in trees.items():
        if not any(isinstance(x, ast.Name) and x.id == "ModuleReport" for x in walk(tree)):
            continue
        for function in _walk_functions(tree):
            for node in walk(function):
                if isinstance(node, ast.Call) and _writes_row(node):
                    writers.append(f"{file}:{function.name}")
                    break
    return writers


def _writes_row(call: ast.Call) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name == "ModuleReport":
        return True
    given = ast.unparse(call.args[0]) if name == "replace" and call.args else ""
    return bool(re.search(r"(^|_)row$|^self.rows|^describe_unchanged", given))


def find_planners(trees: dict[Path, ast.Module]) -> list[str]:
    """Places that plan where the modules of a LoRA go: each begins the stages of a transfer."""
    return [
        f"{file}:{function.name}"
        for file, tree in trees.items()
        for function in _walk_functions(tree)
        for node in walk(function)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "make_plan"
    ]


# Classes of options: their fields are the options of the verbs.
OPTION_CLASSES = {
    "VerbOptions",
    "FileOutput",
    "Output",
    "Resources",
    "BaseResources",
    "TransferOptions",
}
ROOMS_OF_VERBS = {"cli", "moving", "making", "fitting", "best.py", "checking", "fleet"}


def find_tellings(trees: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """Option -> public signatures and classes of the verbs that give it a default once more."""
    tellings: dict[str, list[str]] = {}
    classes = [node for tree in trees.values() for node in walk(tree)]
    for node in classes:
        if isinstance(node, ast.ClassDef) and node.name in OPTION_CLASSES:
            tellings |= {name: [] for name in _list_defaults(node)}
    for file, tree in trees.items():
        if file.parts[0] in ROOMS_OF_VERBS:
            for node in walk(tree):
                for name in tellings.keys() & set(_list_defaults(node)):
                    tellings[name].append(f"{file}:{node.name}")
    return tellings


def _list_defaults(node: ast.AST) -> list[str]:
    """Fields of a class, or parameters of a public function, that have a default."""
    if isinstance(node, ast.ClassDef):
        fields = [x for x in node.body if isinstance(x, ast.AnnAssign) and x.value]
        return [ast.unparse(field.target) for field in fields]
    if not isinstance(node, Function) or node.name.startswith("_"):
        return []
    plain = [*node.args.posonlyargs, *node.args.args]
    plain = plain[len(plain) - len(node.args.defaults) :]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [x.arg for x in (*plain, *(x for x, default in keywords if default is not None))]


# What a user of the library sees beside `prolora` itself.
PUBLIC_MODULES = {"prolora", "prolora.errors", "prolora.cli.app"}


def count_inner_tests(tests: Path) -> int:
    """Counts the test functions that name anything inside the package."""
    count = 0
    for file in tests.rglob("test_*.py"):
        tree = parse_file(file)
        inner = {
            alias.asname or alias.name
            for node in walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prolora")
            for alias in node.names
            if node.module not in PUBLIC_MODULES
            or (node.module == "prolora" and (PACKAGE / alias.name).is_dir())
        }
        for function in _walk_functions(tree):
            names = [node for node in walk(function) if isinstance(node, ast.Name)]
            dotted = [node for node in walk(function) if isinstance(node, ast.Attribute)]
            count += function.name.startswith("test_") and (
                any(node.id in inner for node in names) or any(map(_is_room, dotted))
            )
    return count


def _is_room(node: ast.Attribute) -> bool:
    """Whether it is `prolora.room`, of a room with no public names of its own."""
    of_package = isinstance(node.value, ast.Name) and node.value.id == "prolora"
    return of_package and node.attr not in ("errors",) and (PACKAGE / node.attr).is_dir()


def count_code_lines(file: Path) -> int:
    """Counts the lines that are no blank, comment, docstring or import."""
    passed: set[int] = set()
    for node in walk(parse_file(file)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            passed |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | Function) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                passed |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(file.read_text("utf-8").splitlines(), 1)
    return sum(
        bool(x.strip()) and not x.strip().startswith("#") for i, x in lines if i not in passed
    )


def measure_sizes(root: Path = PACKAGE.parents[1]) -> dict[str, int]:
    """Counts lines of product, rooms, tests and bench, and words of docs."""
    package = root / "python/prolora"
    texts = {file.relative_to(package): file.read_text("utf-8") for file in package.rglob("*.py")}
    lines = {file: text.count("\n") for file, text in texts.items()}
    sizes = {
        "product lines": sum(lines.values()),
        "product code lines": sum(count_code_lines(package / file) for file in texts),
        "longest file": max(lines.values()),
    }
    for file, count in sorted(lines.items()):
        room = f"{file.parts[0]}/" if len(file.parts) > 1 else str(file)
        sizes[room] = sizes.get(room, 0) + count
    for name, folder, endings in (
        ("csrc", "csrc", ("h", "cu", "cpp")),
        ("ComfyUI pack", "integrations/comfyui", ("py", "js")),
        ("test lines", "tests", ("py",)),
        ("bench lines", "bench", ("py",)),
    ):
        files = [file for ending in endings for file in (root / folder).rglob(f"*.{ending}")]
        sizes[name] = sum(file.read_text("utf-8").count("\n") for file in files)
    sizes["tests that name inner names"] = count_inner_tests(root / "tests")
    tellings = find_tellings(parse_files(package))
    sizes["tellings of an option"] = max(map(len, tellings.values()))
    words = {file.name: len(file.read_text("utf-8").split()) for file in root.glob("docs/*.md")}
    sizes["words of api.md"] = words.pop("api.md")
    sizes["words of docs"] = sum(words.values())
    sizes["words of README"] = len((root / "README.md").read_text("utf-8").split())
    return sizes


if __name__ == "__main__":
    for name, size in measure_sizes(*map(Path, sys.argv[1:])).items():
        print(f"{size:6}  {name}")
