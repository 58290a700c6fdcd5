"""A dry run of a release: green as the repository is, red with each fault that once stood there."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import add_stray_files, make_clone, run_git

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "release.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution holds no .ci")
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
RELEASE, PACK = ".github/workflows/release.yml", "integrations/comfyui"
FORM = ".github/ISSUE_TEMPLATE/it-loads-and-does-nothing.yml"


@pytest.fixture
def release():
    spec = importlib.util.spec_from_file_location("release_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path):
    """A git repository of the files that the dry run reads."""
    return make_clone(tmp_path / "root")


def test_the_dry_run_of_a_release_is_green(release, copy):
    assert release.check(ROOT) == [] == release.check(copy)


FAULTS = {
    "a retired machine": (RELEASE, "macos-15", "macos-14", "no machine is called macos-14"),
    "a retired machine of CI": (".github/workflows/ci.yml", "macos-15", "macos-14", "macos-14"),
    "macOS without a torch": ("pyproject.toml", '["arm64"]', '["arm64", "x86_64"]', "arm64 alone"),
    "no 3.14": ("pyproject.toml", " cp314-*", "", "cp314"),
    "an old cibuildwheel": (RELEASE, "cibuildwheel@v3.4", "cibuildwheel@v2.23", "cibuildwheel"),
    "one red system": (RELEASE, "needs: [pure, linux]", "needs: [pure, linux, others]", "one red"),
    "uncounted wheels": (RELEASE, "release.py wheels dist linux", "true", "wheels dist linux"),
    "an unchecked pack": (RELEASE, "release.py pack", "true", "job pack"),
    "one version of prolora": (
        f"{PACK}/pyproject.toml",
        'dependencies = ["numpy>=1.23"',
        'dependencies = ["prolora==0.1.0"',
        "breaks the next pack",
    ),
    "the pack's name": (f"{PACK}/pyproject.toml", '"prolora"', '"comfyui-prolora"', "pack's id"),
    "a version": ("CITATION.cff", "version: ", "version: 9", "CITATION.cff has version 9"),
    "a command that is gone": (FORM, "`prolora check`", "`prolora inspect`", "prolora inspect"),
    "an extra that is gone": ("pyproject.toml", "\nhub = ", "\nhubs = ", "no extra hub"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_it_red(release, copy, fault):
    name, old, new, said = FAULTS[fault]
    text = (copy / name).read_text("utf-8")
    assert old in text
    (copy / name).write_text(text.replace(old, new), "utf-8")
    faults = release.check(copy)
    assert len(faults) >= 1 and any(said in one for one in faults), faults


@needs_git
def test_tracked_unknown_files_in_the_root_are_reported(release, copy):
    for name in ("x", "outputs/y.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
        run_git(copy, "add", name)
    expected = ["the root has an unknown outputs", "the root has an unknown x"]
    assert release.check(copy) == expected
    # As the command that a release runs.
    line = [sys.executable, ".ci/release.py", "check"]
    done = subprocess.run(line, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (1, expected)


def test_stray_files_in_the_root_are_ignored(release, copy):
    add_stray_files(copy)
    assert release.check(copy) == []
    line = [sys.executable, ".ci/release.py", "check"]
    done = subprocess.run(line, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_root_is_not_judged_without_git(release, copy):
    shutil.rmtree(copy / ".git", ignore_errors=True)
    add_stray_files(copy)
    assert release.list_tracked(copy) == [] == release.check(copy)


@needs_git
def test_git_ignores_the_folder_of_the_demo(copy):
    add_stray_files(copy)
    shown = run_git(copy, "status", "--short", "--untracked-files=normal").splitlines()
    stray = [line[3:] for line in shown if line.startswith("?? ")]
    assert stray == ["notebook.ipynb", "notes.md", "outputs/", "venv/"]


def test_a_pack_without_ignored_files_or_address_is_not_published(release, copy):
    (copy / PACK / ".comfyignore").unlink()
    assert len(release.check(copy)) == 1
    release.stamp_pack("0.2.0", copy)
    (no_list, no_address) = release.check_pack(copy, publish=True)
    assert ".comfyignore" in no_list and "Repository" in no_address
    project = (copy / PACK / "pyproject.toml").read_text("utf-8")
    assert 'dependencies = ["prolora>=0.2.0,<1"]' in project and 'version = "0.2.0"' in project
    assert (copy / PACK / "requirements.txt").read_text() == "prolora>=0.2.0,<1\n"


def test_wheels_are_counted_by_their_tags(release):
    names = [name.format("1.0") for name in release.PURE]
    for python in release.PYTHONS:
        for processor in ("x86_64", "aarch64"):
            tags = f"manylinux_2_27_{processor}.manylinux_2_28_{processor}"
            names.append(f"prolora-1.0-{python}-{python}-{tags}.whl")
    assert release.check_wheels(names, "1.0", release.LINUX) == []
    missing = [name for name in names if "cp314-cp314-manylinux_2_27_x86_64" not in name]
    (fault,) = release.check_wheels(missing, "1.0", release.LINUX)
    assert "cp314" in fault
    assert len(release.check_wheels(names, "1.0", release.LINUX + release.OTHERS)) == 10


def test_every_wheel_that_is_promised_has_a_python_that_installs_it(release):
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    least = re.search(r'requires-python = ">=3\.(\d+)"', project)[1]
    assert release.PYTHONS[0] == f"cp3{least}" and sys.version_info >= (3, int(least))
