"""The command line starts fast without torch, and Ctrl-C ends it at any moment."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer
from mini import write_case

from prolora.cli.app import app

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")

PROGRAM = """
import atexit, sys
sys.argv[0] = "prolora"
atexit.register(lambda: print("torch" in sys.modules, len(sys.modules), file=sys.stderr))
from prolora.cli import main
main()
"""
MOST_MODULES = 400  # 1,472 with torch
# Python itself needs the first moments, before a line of ours runs.
BEGIN = "from prolora.cli import main; print(flush=True); main()"
COMPLETE = {"_PROLORA_COMPLETE": "complete_bash"}


def start(*words, **environment):
    """(Exit code, output, errors) of the command line in a process of its own."""
    line = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "typed", "said"),
    [
        (("-h",), "", "migrate"),
        (("transfr",), "", "Did you mean 'transfer'?"),
        ((), "prolora tr", "transfer"),
    ],
    ids=["help", "mistyped", "Tab"],
)
def test_a_start_loads_no_torch_and_few_modules(words, typed, said):
    """A third of a second is what so many modules take; a loaded machine would fail a clock."""
    shell = COMPLETE | {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))} if typed else {}
    code, output, errors = start(*words, **shell)
    assert said in output + errors
    assert code == (2 if words == ("transfr",) else 0)
    torch, modules = errors.split()[-2:]
    assert torch == "False" and int(modules) <= MOST_MODULES
    for verb, command in typer.main.get_command(app).commands.items() if words == ("-h",) else ():
        (row,) = re.findall(rf"^\W*{verb} +(\w.{{20}})", output, re.MULTILINE)
        assert command.help.startswith(row), verb


def press(line, seconds):
    """(Exit code, output, errors) of a process that gets a Ctrl-C after some time."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout and process.stdout.read(1) == "\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    "moments", [[0.1, 0.8], pytest.param([i / 6 for i in range(20)], marks=pytest.mark.slow)]
)
def test_ctrl_c_at_any_moment_is_one_line_and_no_file(tmp_path, moments):
    """A second is about what a whole command takes."""
    lora, source, target = write_case(tmp_path)
    out = tmp_path / "moved" / "out.safetensors"
    line = ("transfer", lora, "--source", source, "--target", target, "-o", out, "--cache", "none")
    stopped = 0
    for moment in moments:
        out.unlink(missing_ok=True)
        out.parent.mkdir(exist_ok=True)
        code, _, errors = press(line, moment)
        if code == 0:  # it was done before
            assert out.is_file() and "Stopped" not in errors
            continue
        stopped += 1
        assert code == 130 and errors.startswith("Stopped; nothing was written"), errors
        assert errors.count("\n") == 1 and not list(out.parent.iterdir()), errors
    assert stopped >= max(1, len(moments) // 3)
