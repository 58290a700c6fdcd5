"""Imports run down the list of rooms only, and the mathematics can be lifted out."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mini
import pytest
import structure
import typer
from checkout import ROOT
from fresh import run_fresh

import prolora
from prolora import core
from prolora.cli.app import app

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the same sources on every system")

PACKAGE = Path(prolora.__file__).parent
# From the top down. Rooms on one line do not know each other.
ROOMS = [
    {"cli"},
    {"best"},
    {"checking"},
    {"fleet"},
    {"making"},
    {"fitting"},
    {"moving"},
    {"verbs"},
    {"reports"},
    {"comparison"},
    {"adapters"},
    {"bases"},
    {"files"},
    {"errors"},
    {"architectures"},
    {"core"},
]
# Imports nothing of prolora, and may be imported by everybody.
LEAVES = {"version"}


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(ROOMS) if room in rooms)


@pytest.mark.parametrize("room", sorted(set().union(*ROOMS) - {"best", "errors"}))
def test_imports_run_down_the_list_of_rooms_only(room):
    upwards = []
    for file in sorted((PACKAGE / room).rglob("*.py")):
        for path in structure.list_imports(file):
            other = path.parts[0].removesuffix(".py")
            if other not in {*LEAVES, room} and level_of(other) <= level_of(room):
                upwards.append(f"{file.relative_to(PACKAGE)} imports {path}")
    assert not upwards


def test_the_top_of_the_package_holds_the_rooms_and_little_else():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    rooms = set().union(*ROOMS) - {"best", "errors"}
    files = {"__init__.py", "__init__.pyi", "__main__.py", "best.py", "errors.py", "version.py"}
    assert entries == rooms | files | {"py.typed"}


# The names of `prolora.core`, in a copy of the folder under another name.
COPIED_OUT = """
import sys, torch
import borrowed
from borrowed import LowRank, principal_angles, project, project_many, similarity, truncated_svd
from borrowed import reference
generator = torch.Generator().manual_seed(0)
source, target = torch.randn(2, 64, 48, generator=generator)
update = LowRank(torch.randn(64, 4, generator=generator), torch.randn(4, 48, generator=generator))
moved = project(update, source, target, rank=16)
wanted = reference.project_dense(update.dense(), source, target, 16, 16, "prolora")
assert (moved.dense() - wanted).norm() < 1e-5 * wanted.norm()
many = project_many({"to_q": update}, {"to_q": source}, {"to_q": target}, rank=16)
assert (many["to_q"].dense() - wanted).norm() < 1e-5 * wanted.norm()
bases = [truncated_svd(weight, 16) for weight in (source, target)]
angles = principal_angles(*(basis.U for basis in bases))
overlap = float(angles.cos().square().mean())
assert abs(overlap - float(similarity(source, target, rank=16).left)) < 1e-5
assert isinstance(bases[0], borrowed.Basis)
foreign = [name for name in sys.modules if name.split(".")[0] == "prolora"]
assert not foreign, foreign
import prolora
other = prolora.project(tuple(update), source, target, rank=16)
assert torch.equal(other.up, moved.up) and type(other) is not LowRank
"""


def test_core_works_under_another_name_without_the_rest_of_the_package(tmp_path):
    shutil.copytree(PACKAGE / "core", tmp_path / "borrowed")
    run_fresh(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{COPIED_OUT}")


def test_core_exports_the_same_objects_as_the_package():
    assert set(core.__all__) < set(prolora.__all__)
    for name in core.__all__:
        assert getattr(core, name) is getattr(prolora, name)
        assert f"{name}(" in core.__doc__ or f"{name} " in core.__doc__


def test_core_similarity_is_a_function_after_its_module_is_imported():
    code = """
import prolora.core
import prolora.core.subspaces, prolora.core.projection, prolora.core.grouped
assert all(callable(getattr(prolora.core, name)) for name in prolora.core.__all__)
"""
    run_fresh(code)


# An editable installation is passed over, which has every module.
WITHOUT_FITTING = """
import sys
sys.meta_path = [x for x in sys.meta_path if "Redirecting" not in type(x).__name__]
import prolora
from prolora.errors import ProLoRAError
lora, source, target, out = sys.argv[1:]
assert prolora.transfer(lora, source, target, out=out).report.coverage
assert prolora.check(out, base=target) and prolora.convert(out, out_rank=2).report.coverage
for error, use in (
    (ImportError, lambda: prolora.fit),
    (ProLoRAError, lambda: prolora.transfer(lora, source, target, method="best")),
):
    try:
        use()
    except error as refusal:
        assert "this copy of prolora" in str(refusal), refusal
    else:
        raise SystemExit("a fit was found")
"""


def test_the_part_that_fits_can_be_deleted(tmp_path):
    left_out = shutil.ignore_patterns("fitting", "fit.py", "demo.py")
    shutil.copytree(PACKAGE, tmp_path / "prolora", ignore=left_out)
    paths = *mini.write_case(tmp_path), tmp_path / "out.safetensors"
    run_fresh(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WITHOUT_FITTING}", *paths)


# Other sizes (lines, words, options, functions that run) are printed: a limit on lines led to dense
# code. Run `python tests/support/structure.py`, or this file with `pytest -s`.
LIMITS = {
    "longest file": 500,
    "exports": 40,
    "modules that --version loads": 281,
}
VERBS = ("transfer", "check", "check of two bases", "convert", "merge", "bake", "migrate")


def list_commands(group, name: str = ""):
    """Yields the commands of the command line with their names."""
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from list_commands(command, f"{name}{part} ")
        else:
            yield name + part, command


def count_options() -> dict[str, int]:
    """Counts the options of each command, --help left out."""
    commands = dict(list_commands(typer.main.get_command(app)))
    told = {
        name: [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        for name, command in commands.items()
    }
    return {name: len(options) for name, options in told.items()}


# What a second transfer in one process takes: files and functions of the package that run (families
# are data); how often each verb opens the LoRA's file; and how many files two of them open, each of
# which a virus scanner may look at.
COUNTS = """
import json, shutil, sys
import prolora
lora, source, target, folder = sys.argv[1:]
ran = set()
prolora.transfer(lora, source, target, out=folder + "/first.safetensors")
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and "/prolora/" in code.co_filename and code.co_name[0] != "<":
        ran.add((code.co_filename, code.co_firstlineno))
sys.setprofile(note)
prolora.transfer(lora, source, target, out=folder + "/second.safetensors")
sys.setprofile(None)
counts = {
    "files of a second transfer": len({file for file, _ in ran if "/families/" not in file}),
    "functions of a second transfer": len(ran),
}
copied = shutil.copy(lora, folder + "/copied.safetensors")
opened = []
sys.addaudithook(lambda event, given: event == "open" and given and opened.append(str(given[0])))
for name, use in {
    "transfer": lambda: prolora.transfer(lora, source, target, out=folder + "/moved.safetensors"),
    "check": lambda: prolora.check(lora, base=source),
    "check of two bases": lambda: prolora.check(lora, source=source, target=target),
    "first convert": lambda: prolora.convert(lora, out=folder + "/first_small.safetensors"),
    "convert": lambda: prolora.convert(lora, out=folder + "/small.safetensors", out_rank=2),
    "merge": lambda: prolora.merge([lora, copied], out=folder + "/merged.safetensors"),
    "bake": lambda: prolora.bake([lora], source, folder + "/baked"),
    "migrate": lambda: prolora.migrate(lora, source, target, folder + "/migrated"),
}.items():
    opened.clear()
    use()
    counts["opens of a LoRA by " + name] = opened.count(lora)
    if name in ("transfer", "convert"):
        files = [one for one in opened if not one.endswith((".py", ".pyc"))]
        counts["opens of a second " + name] = len(files)
print(json.dumps(counts))
"""
VERSION = """
import sys
from prolora.cli import main
sys.argv[1:] = ["--version"]
try:
    main()
except SystemExit:
    print(len(sys.modules))
"""


def measure_start() -> int:
    """Counts the modules of `prolora --version`, whose process has imported nothing before."""
    done = subprocess.run([sys.executable, "-c", VERSION], capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_sizes(sizes):
    for name, size in sizes.items():
        print(f"{size:6}  {name}")


def test_each_verb_opens_the_lora_once(tmp_path):
    output = run_fresh(COUNTS, *mini.write_case(tmp_path), tmp_path)
    counts = json.loads(output.splitlines()[-1])
    print_sizes(counts)
    assert [counts[f"opens of a LoRA by {verb}"] for verb in VERBS] == [1] * len(VERBS)


def test_sizes_stay_within_their_limits():
    options = count_options()
    sizes = structure.measure_sizes() | {
        "options": sum(options.values()),
        "most options of a command": max(options.values()),
        "commands": len(options),
        "exports": len(prolora.__all__),
        "modules that --version loads": measure_start(),
    }
    print_sizes(sizes)
    larger = {name: (sizes[name], most) for name, most in LIMITS.items() if sizes[name] > most}
    assert not larger, f"(size, limit): {larger}"


@pytest.fixture(scope="module")
def trees():
    return structure.parse_files(PACKAGE)


def test_classes_and_public_functions_have_names_of_their_own(trees):
    assert not structure.find_duplicate_names(trees)


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        (["core/basis.py", "core/reference.py"], True),
        (["cli/merge.py", "making/merge.py"], True),
        (["cli/similarity.py", "core/similarity.py", "core/reference.py"], True),
        (["core/basis.py", "core/projection.py"], False),
        (["core/basis.py", "core/projection.py", "core/reference.py"], False),
        (["bases/weights.py", "core/reference.py"], False),
        (["bases/weights.py", "core/weights.py"], False),
    ],
)
def test_only_ops_and_their_dense_twins_and_commands_share_names(files, allowed):
    definition = ast.parse("def truncated_svd(): ...")
    found = structure.find_duplicate_names({Path(file): definition for file in files})
    assert found == ({} if allowed else {"truncated_svd": sorted(files)})


def test_signatures_and_functions_stay_small(trees):
    assert not structure.find_wide_signatures(trees)
    assert not structure.find_long_functions(trees)


def test_a_call_names_its_arguments(trees):
    pack = structure.parse_files(PACKAGE.parents[1] / "integrations")
    assert not structure.find_starred_calls(trees | pack)


def test_the_core_is_explained_in_five_hundred_lines():
    """Those that docs/architecture.md names first."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## The rooms")[0]
    files = re.findall(r"\]\(\.\./(\S+\.(?:py|md|h))\)", page)
    assert len(files) == 5
    assert sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in files) <= 500


def test_files_do_not_import_each_other_in_circles(trees):
    assert not structure.find_circles(trees)


def test_the_stages_of_a_transfer_and_the_rows_of_its_report_have_one_home(trees):
    assert structure.find_planners(trees) == ["moving/base_pair.py:plan"]
    writers = {name.partition(":")[0] for name in structure.find_row_writers(trees)}
    assert writers <= {
        "moving/ledger.py",
        "moving/base_fit.py",
        "verbs/rows.py",
        "reports/module_report.py",
        "fitting/finishing.py",
        "fitting/fit_report.py",
    }


def test_flags_of_the_command_line_are_named_there_alone(trees):
    """Errors and reports reach people in Python and in ComfyUI, who have no flags."""
    assert not structure.find_flags(trees)
