"""Which small changes of the code do the tests near it not notice?

    python tests/attack/mutants.py FILE ... [--most 60] [--jobs 2] [--out rows.jsonl]
    python tests/attack/mutants.py --since REV [...]
    python tests/attack/mutants.py --chosen [--only WORD] [--out rows.jsonl]

The repository is copied, and only the copy is changed. For each file, the tests near it run once:
those of its own name, those that import it or what imports it, and its room. That shows which test
runs which function. Then each mutant (mutations.py) is put into the file and the tests of its
function run, the quickest first, until one fails. Those that all tests pass are listed: a test is
missing, or the change makes no difference. With `--since`, only lines changed since a revision are
mutated. `--chosen` takes the mutants of mutants.json, each of which breaks a promise of the docs
and names its tests. What --out has is not done again. The exit code is 1 where too many live.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutations import Mutant, list_mutants

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from structure import list_imports  # noqa: E402

PACKAGE = "python/prolora"
PREPARED = ("torch", "numpy", "safetensors.torch", "hypothesis", "typer.testing", "rich.table")
PREPARED += ("diffusers", "transformers", "peft", "gguf", "matplotlib")
"""What many tests import: once here, where it is installed, and not in each process."""

FILES, SECONDS = 24, 15.0
"""The most files of tests that are near a file, and the most time that each of them gets once."""

PER_MUTANT = 45.0
"""The most seconds of tests that are run for a mutant that none of them notices."""

MOST_ALIVE, MOST_CHOSEN_ALIVE = 0.15, 4
"""The most that may live: the share of mechanical mutants, and the number of chosen ones."""

TABLE: dict[str, list[Any]] = json.loads(
    (Path(__file__).parent / "mutants.json").read_text("utf-8")
)
"""Chosen mutants, and mechanical ones [file, line, change] that make no difference."""

_MARK, _VERB = "__mutants_seen__", re.compile(r"\bprolora\.(\w+)\(")


@dataclass(frozen=True)
class Test:
    """A test that ran, and the functions of the file that it entered."""

    name: str
    seconds: float
    functions: frozenset[str]


def copy_repository(place: Path) -> Path:
    """What git knows of the working tree, and what was compiled into the installed package."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    # An editable installation has it beside none of the sources.
    compiled = [*Path(sysconfig.get_path("platlib"), "prolora").rglob("*.so")]
    for path in compiled:
        shutil.copy2(path, place / PACKAGE / "core")
    if not compiled:
        print("no extension is installed: mutants of what it runs may live", file=sys.stderr)
    return place


# --- which tests are near --------------------------------------------------------------------


def list_near_tests(file: str, most: int = FILES) -> list[str]:
    """Files of tests, the nearest first.

    Distance 0 is a test named after the file or its folder in a room, 1 one that imports it or
    calls a verb of it, 2 one that imports a file which imports it, and so on; those of the same
    room count as two steps nearer.
    """
    package, start = ROOT / PACKAGE, Path(file).relative_to(PACKAGE)
    distance, waiting, importers = {start: 0}, [start], defaultdict(set)
    for path in package.rglob("*.py"):
        for imported in list_imports(path, package):
            importers[imported].add(path.relative_to(package))
    while waiting:
        name = waiting.pop(0)
        for other in importers[name] - distance.keys() - {Path("__init__.py")}:
            distance[other] = distance[name] + 1
            waiting.append(other)
    order = []
    homes = re.findall(r'"(\w+)": "([\w.]+)",', (package / "__init__.py").read_text("utf-8"))
    verbs = {name: Path(*home.split(".")) for name, home in homes}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        used = [verbs[x] for x in set(_VERB.findall(path.read_text("utf-8"))) & verbs.keys()]
        near = [*list_imports(path, package), *(x.with_suffix(".py") for x in used)]
        near += [x / "__init__.py" for x in used]
        far = 1 + min((distance.get(i, 9) for i in near), default=9)
        words = set(path.stem.split("_"))
        if set(start.stem.split("_")) <= words or words & {*start.parts[1:-1]}:
            far = 0
        here = path.relative_to(ROOT / "tests").parts[0] == start.parts[0]
        if far < 9 or here:
            order.append((far - 2 * here, path.relative_to(ROOT).as_posix()))
    return [name for _, name in sorted(order)[:most]]


# --- running tests in a forked process -------------------------------------------------------


class Watcher:
    """A plugin of pytest: how long each test takes, and which functions it enters."""

    def __init__(self) -> None:
        """Has seen nothing yet."""
        self.tests: list[dict[str, Any]] = []
        self.spent: dict[str, float] = defaultdict(float)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Leaves out the rest of a file that takes long."""
        if self.spent[str(item.path)] > SECONDS:
            pytest.skip("the file of this test has taken the time that a mutant may take")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around each test, its fixtures included."""
        seen: set[str] = sys.modules["builtins"].__dict__[_MARK]
        seen.clear()
        began = time.process_time()  # other work on the machine hides no test
        yield
        facts = {"name": item.nodeid, "seconds": time.process_time() - began}
        self.spent[str(item.path)] += facts["seconds"]
        self.tests.append(facts | {"functions": sorted(seen)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails without any mutant says nothing about one."""
        if report.failed:
            self.tests.append({"name": report.nodeid, "failed": True})


def watch(text: str) -> str:
    """The file with a note at the beginning of each outermost function that it was entered."""
    tree = ast.parse(text)

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{node.name}:{node.lineno}"
                note = f"__builtins__['{_MARK}'].add({name!r})"
                if isinstance(node.body[0], ast.Expr) and len(node.body) > 1:
                    node.body.insert(1, ast.parse(note).body[0])
                else:
                    node.body.insert(0, ast.parse(note).body[0])
            elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
                visit(node.body)

    visit(tree.body)
    return ast.unparse(ast.fix_missing_locations(tree))


def run_tests(
    place: Path, words: list[str], seconds: float, plugins: list[Any], notes: Path
) -> int:
    """pytest in a forked process in a copy; its exit code, or below 0 at the limit of CPU time."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
            quiet = os.open(notes.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.chdir(place)
            sys.dont_write_bytecode = True
            # An editable installation has every module, and would never look at the copy.
            sys.meta_path = [x for x in sys.meta_path if "Redirecting" not in type(x).__name__]
            sys.path[:0] = [str(place / "python")]
            os.environ["PYTHONPATH"] = str(place / "python")
            os.environ.pop("PYTEST_ADDOPTS", None)
            sys.modules["builtins"].__dict__[_MARK] = set()
            fast = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
            code = int(pytest.main(["-q", "-x" if not plugins else "-q", *fast, *words], plugins))
            if plugins:
                notes.write_text(json.dumps(plugins[0].tests))
        finally:
            os._exit(code)
    until = time.monotonic() + 10 * seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.02)


def find_tests(place: Path, file: str, tests: list[str]) -> list[Test]:
    """The tests that enter a function of a file, the quickest first."""
    path, notes = place / file, place / "seen.json"
    text = path.read_text("utf-8")
    path.write_text(watch(text), "utf-8")
    try:
        run_tests(place, tests, 60 + 2 * SECONDS * len(tests), [Watcher()], notes)
        facts = json.loads(notes.read_text())
    finally:
        path.write_text(text, "utf-8")
    failed = {fact["name"] for fact in facts if "failed" in fact}
    found = [
        Test(fact["name"], fact["seconds"], frozenset(fact["functions"]))
        for fact in facts
        if fact.get("functions") and fact["name"] not in failed
    ]
    return sorted(found, key=lambda test: test.seconds)


def judge(place: Path, file: str, mutant: Mutant, tests: list[Test]) -> str:
    """ "killed", "survived", or "untested" where no test enters its function."""
    mine = [test for test in tests if mutant.function in test.functions or not mutant.function]
    if not mine:
        return "untested"
    path = place / file
    text = path.read_text("utf-8")
    path.write_text(mutant.text, "utf-8")
    try:
        for stage in list_stages(mine):
            seconds = 3 * sum(test.seconds for test in stage) + 30
            names = [test.name for test in stage]
            if run_tests(place, names, seconds, [], place / "mutant.json"):
                return "killed"
    finally:
        path.write_text(text, "utf-8")
    return "survived"


def list_stages(tests: list[Test]) -> list[list[Test]]:
    """Some tests of one file, which are soon there; then others, as many as there is time for."""
    files: dict[str, list[Test]] = defaultdict(list)
    for test in tests:
        files[test.name.partition("::")[0]].append(test)
    first = max(files.values(), key=len)[:40]
    rest, left = [], PER_MUTANT
    for test in tests:
        if test not in first and test.seconds < left:
            rest.append(test)
            left -= test.seconds
    return [stage for stage in (first, rest) if stage]


# --- the whole --------------------------------------------------------------------------------


def list_changed(since: str) -> dict[str, set[int]]:
    """File of the package -> lines that were changed since a revision."""
    words = ["git", "diff", "--unified=0", since, "--", PACKAGE]
    diff = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    changed: dict[str, set[int]] = {}
    file = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line[6:]
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            changed.setdefault(file, set()).update(range(first, first + count))
    return {f: lines for f, lines in changed.items() if f.endswith(".py") and (ROOT / f).is_file()}


def test_file(
    places: list[Path], file: str, lines: set[int] | None, most: int, seed: int
) -> dict[str, Any]:
    """Mutates a file in the copies, one process for each, and gives the figures."""
    began = time.monotonic()
    mutants = list_mutants((ROOT / file).read_text("utf-8"))
    mutants = [m for m in mutants if lines is None or m.line in lines]
    chosen = sorted(Random(seed).sample(range(len(mutants)), min(most, len(mutants))))
    near = list_near_tests(file) if chosen else []
    tests = find_tests(places[0], file, near) if chosen else []
    notes = [place / "verdicts.jsonl" for place in places]
    workers = []
    for number, place in enumerate(places):
        notes[number].write_text("")
        if (pid := os.fork()) == 0:
            for index in chosen[number :: len(places)]:
                verdict = judge(place, file, mutants[index], tests)
                with open(notes[number], "a") as opened:
                    opened.write(json.dumps([index, verdict]) + "\n")
            os._exit(0)
        workers.append(pid)
    for pid in workers:
        os.waitpid(pid, 0)
    verdicts = dict(json.loads(line) for note in notes for line in note.read_text().splitlines())
    lines_of = (ROOT / file).read_text("utf-8").splitlines()
    for i in verdicts:
        there = lines_of[mutants[i].line - 1].strip()
        if [file, there, mutants[i].what] in TABLE["equivalents"]:
            verdicts[i] = "equivalent"
    left = [
        f"{file}:{mutants[i].line} {verdicts[i]}: {mutants[i].what}"
        for i in sorted(verdicts)
        if verdicts[i] in ("survived", "untested")
    ]
    counts = {
        name: list(verdicts.values()).count(name)
        for name in ("killed", "survived", "untested", "equivalent")
    }
    facts = {"file": file, "mutants": len(mutants), "tried": len(verdicts), **counts}
    seconds = round(time.monotonic() - began, 1)
    return facts | {"tests": len(tests), "near": near, "seconds": seconds, "left": left}


def run_chosen(place: Path, chosen: list[dict[str, Any]], out: Path | None) -> int:
    """Runs the named tests on each chosen mutant, and counts those that live."""
    done = {}
    if out and out.exists():
        rows = map(json.loads, out.read_text().splitlines())
        done = {row["promise"]: row["verdict"] for row in rows}
    waiting = [one for one in chosen if one["promise"] not in done]
    files = sorted({test for one in waiting for test in one["tests"]})
    watcher, notes = Watcher(), place / "seen.json"
    run_tests(place, files, 60 + 2 * SECONDS * len(files), [watcher], notes) if files else None
    facts = json.loads(notes.read_text()) if files else []
    passed_over = [f"--deselect={fact['name']}" for fact in facts if "failed" in fact]
    for one in waiting:
        path = place / one["file"]
        text = path.read_text("utf-8")
        if text.count(one["old"]) != 1:
            raise SystemExit(f"{one['file']}: {one['old']!r} does not stand there once")
        path.write_text(text.replace(one["old"], one["new"]), "utf-8")
        began = time.monotonic()
        words = [*one["tests"], *passed_over]
        code = run_tests(place, words, 300.0, [], place / "mutant.json")
        path.write_text(text, "utf-8")
        done[one["promise"]] = {0: "survived", -1: "hung"}.get(code, "killed")
        row = {"promise": one["promise"], "verdict": done[one["promise"]]}
        row |= {"seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if out:
            with open(out, "a") as opened:
                opened.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sum(done[one["promise"]] != "killed" for one in chosen)


def main() -> None:
    """Mutates files and lists what no test noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="of the package, below the repository")
    parser.add_argument("--since", help="a revision: lines changed since then")
    parser.add_argument("--chosen", action="store_true", help="the mutants of mutants.json")
    parser.add_argument("--only", default="", help="of these, with this word in promise or file")
    parser.add_argument("--most", type=int, default=60, help="mutants of a file; a sample of more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="no further file after these")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file that gets a line for each file")
    args = parser.parse_args()
    files: dict[str, set[int] | None] = {
        Path(name).resolve().relative_to(ROOT).as_posix(): None for name in args.files
    }
    if args.since:
        changed = list(list_changed(args.since).items())
        Random(args.seed).shuffle(changed)  # or the same ones are left where there is no time
        files |= dict(changed)
    for name in PREPARED:
        with suppress(ImportError):
            __import__(name)
    sys.modules["torch"].set_num_threads(1)
    total: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        places = [copy_repository(Path(folder) / str(number)) for number in range(args.jobs)]
        if args.chosen:
            chosen = [x for x in TABLE["chosen"] if args.only in x["promise"] + x["file"]]
            alive = run_chosen(places[0], chosen, args.out)
            print(f"{alive} of {len(chosen)} chosen mutants live")
            sys.exit(alive > MOST_CHOSEN_ALIVE)
        until = time.monotonic() + 60 * args.minutes
        rows = args.out.read_text().splitlines() if args.out and args.out.exists() else []
        done = {row["file"]: row for row in map(json.loads, rows)}
        for file, lines in files.items():
            if time.monotonic() > until:
                print(f"{file}: no time left")
                continue
            facts = done.get(file) or test_file(places, file, lines, args.most, args.seed)
            for name in ("tried", "killed", "survived", "untested", "equivalent"):
                total[name] += facts[name]
            print("\n".join(facts["left"]), flush=True)
            if args.out and file not in done:
                with open(args.out, "a") as opened:
                    opened.write(json.dumps(facts) + "\n")
    print(json.dumps(total))
    alive, tried = total["survived"] + total["untested"], total["tried"] - total["equivalent"]
    sys.exit(alive > MOST_ALIVE * tried)


if __name__ == "__main__":
    main()
