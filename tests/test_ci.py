"""`.ci/run` without its tools: stand-ins that note what runs, and one of them fails."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import add_stray_files, make_clone, run_git

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("bash") and (ROOT / ".ci").exists()),
    reason="the script runs on Linux, and a source distribution holds no .ci",
)

# pip is called in the background for the linters, then for mypy and others, where it starts a
# process that would go on for minutes, and by both commands of the README.
PIP = """#!/bin/bash
case "$*" in
  *mypy*) if [ -n "$HANGS" ]; then sleep 300 & echo $! >>"$NOTES/children"; wait; fi ;;
  *demo*) until [ -z "$HANGS" ] || [ -s "$NOTES/children" ]; do sleep 0.02; done
    eval "$INSTALL" ;;
esac
"""
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && touch "$3/bin/activate" ;;
  "-m ziglang" | docs/* | tests/*) ;;
  *) exec "$PYTHON" "$@" ;;
esac
"""
INSTALL = """
at=$(echo "$TMPDIR"/tmp.*/venv)/lib/python3/site-packages/prolora-0.dist-info
mkdir -p "$at"
echo "Tag: py3-none-any" >"$at/WHEEL"
touch "$at/RECORD"
"""
# Each run of the tests prints its arguments; the first also where the extension ran.
PYTEST = """#!/bin/bash
echo "$PWD: pytest $*" >>"$NOTES/ran"
if [ -n "$PROLORA_LIST_EXTENSION_TESTS" ]; then
  printf 'tests/core/test_a.py::test_%s\\n' a b a >"$PROLORA_LIST_EXTENSION_TESTS"
fi
echo "pytest $*"
"""
PROLORA = """#!/bin/bash
echo "$PWD: prolora $*" >>"$NOTES/ran"
case "$1" in demo) mkdir -p prolora-demo ;; esac
"""
NAMES = ("pip", "python", "python3", "pytest", "prolora", "ruff", "clang-format", "node", "mypy")


@pytest.fixture
def begun(tmp_path):
    """Starts `.ci/run` of a clone with stand-ins; what the README's commands do is shell."""
    tools, started = tmp_path / "tools", []
    clone = make_clone(tmp_path / "clone")
    add_stray_files(clone)
    tools.mkdir()
    scripts = {"pip": PIP, "python": PYTHON, "python3": PYTHON, "pytest": PYTEST}
    scripts["prolora"] = PROLORA
    for name in (*NAMES, "mkdocs"):
        (tools / name).write_text(scripts.get(name, "#!/bin/bash\n"))
        (tools / name).chmod(0o755)
    known = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "NOTES": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }

    # A run of the script that runs this test keeps its own list.
    outer = {k: v for k, v in os.environ.items() if k != "PROLORA_LIST_EXTENSION_TESTS"}

    def begin(install, hangs="yes"):
        started.append(
            subprocess.Popen(
                [clone / ".ci" / "run"],
                env=outer | known | {"INSTALL": install, "HANGS": hangs},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # Whoever runs the tests in the background may ignore it, and a shell keeps that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[0]

    yield begin
    for process in started:
        process.kill()
        process.wait()
    for child in list_children(tmp_path):
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def list_children(notes):
    file = notes / "children"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def check_nothing_is_left_of(notes):
    for child in list_children(notes):
        wait_until(lambda child=child: not is_alive(child))
    assert not list(notes.glob("tmp.*")), "the folder of the run is left"


def test_a_step_that_fails_ends_what_runs_beside_it_with_its_children(begun, tmp_path):
    run = begun("exit 7")
    said = run.communicate(timeout=60)[0]
    assert run.returncode != 0, said
    assert list_children(tmp_path)
    check_nothing_is_left_of(tmp_path)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_ends_its_step_and_what_runs_beside_it(begun, tmp_path, sign):
    run = begun('sleep 300 & echo $! >>"$NOTES/children"; wait')
    wait_until(lambda: len(list_children(tmp_path)) == 2)
    run.send_signal(sign)
    run.communicate(timeout=60)
    assert run.returncode != 0
    check_nothing_is_left_of(tmp_path)


def test_a_run_in_which_nothing_fails_takes_every_step_and_ends_with_the_tests(begun, tmp_path):
    run = begun(INSTALL, hangs="")
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 0, said
    steps = [line for line in said.splitlines() if line.startswith("=== done")]
    assert len(steps) == said.count("\n=== ") - said.count("\n=== done") + 1 == 4, said
    lines = said.splitlines()
    assert lines[-1].startswith("pytest -n auto") and lines[-2].endswith(
        "test_a.py::test_a tests/core/test_a.py::test_b"
    )
    assert "pytest --benchmark-disable bench" in lines
    check_nothing_is_left_of(tmp_path)
    assert (tmp_path / "clone" / "prolora-demo").is_dir()


def test_the_demo_and_then_the_tests_run_in_the_clone(begun, tmp_path):
    run = begun(INSTALL, hangs="")
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 0, said
    ran = [line.split(": ", 1) for line in (tmp_path / "ran").read_text().splitlines()]
    clone = str(tmp_path / "clone")
    assert ran[0] == [clone, "prolora demo --target pruned --overwrite"]
    assert [clone, "pytest -n auto --maxprocesses 4"] in ran[1:]
    # After the demo, and in the background with an extension for cards.
    assert [x for _, x in ran if x.startswith("prolora ")][1:] == ["prolora doctor"] * 2


def reach(*changed):
    spec = importlib.util.spec_from_file_location("reached", ROOT / ".ci" / "reached.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reach_tests(list(changed), module.list_rooms())


def test_a_change_reaches_the_tests_of_its_room_and_of_all_rooms_above():
    above = {f"tests/{room}" for room in ("cli", "checking", "fleet", "making", "integrations")}
    assert reach("python/prolora/making/merge.py", "docs/guide.md") == above
    assert reach("python/prolora/cli/app.py", "integrations/comfyui/nodes.py") == {
        "tests/cli",
        "tests/integrations",
    }
    assert reach("python/prolora/best.py") == {"tests/cli", "tests/integrations"}
    assert reach("tests/moving/test_plan.py", "bench/own_ops.py", "tests/test_ci.py") == {
        "tests/moving"
    }
    assert "tests/core" in reach("python/prolora/core/basis.py")
    borrowers = reach("tests/support/published_models.py", "python/prolora/__init__.pyi")
    assert "tests/architectures" in borrowers and "tests/core" not in borrowers


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_stray_files_in_the_root_are_not_changes(tmp_path):
    clone = make_clone(tmp_path / "clone")
    run_git(clone, "-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x")
    add_stray_files(clone)
    (clone / "docs" / "new.md").write_text("new")
    (clone / "README.md").write_text("changed")
    code = "import reached; print(*reached.list_changes('HEAD'))"
    line = [sys.executable, "-c", code]
    changes = subprocess.check_output(line, cwd=clone / ".ci", text=True).split()
    assert changes == ["README.md", "docs/new.md"]


@pytest.mark.parametrize("path", ["pyproject.toml", "csrc/ops.h", "tests/conftest.py", ".ci/run"])
def test_a_change_outside_the_rooms_reaches_all_tests(path):
    assert reach("docs/guide.md", path) is None
