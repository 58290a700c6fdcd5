"""The attacks see what they look for: each is shown a command that does it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ATTACK = Path(__file__).parent / "attack"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks /proc")


@pytest.fixture
def attack(monkeypatch):
    """The harnesses, as modules."""
    monkeypatch.syspath_prepend(str(ATTACK))
    import damage_loras
    import foreign_files
    import kills
    import sandbox

    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "MEGABYTES", 150)
    return {
        "damage": damage_loras,
        "foreign": foreign_files,
        "kills": kills,
        "sandbox": sandbox,
    }


@pytest.fixture
def box(attack, tmp_path):
    made = attack["sandbox"].Box(tmp_path)
    made.begin()
    (made.inputs / "lora.safetensors").write_text("a week of training")
    return made


def test_what_every_attack_begins_with_runs(attack, box, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv("PROLORA_CACHE", str(box.root / "home"))
    attack["sandbox"].warm_up(box)
    assert (box.out / "moved.safetensors").exists() and list((box.out / "moved").rglob("*.safe*"))


def wait_for_ever(box):
    time.sleep(60)


def spoil_an_input(box):
    (box.inputs / "lora.safetensors").write_text("x")


def write_elsewhere(box):
    (box.root / "victim").write_text("x")


def leave_a_temporary(box):
    (box.out / ".prolora-0123456789abcdef.tmp").write_text("x")


def run_a_pickle(box):
    box.canary.write_text("x")


def fail(box):
    raise TypeError("not prolora's")


def crash(box):
    os.abort()


def take_memory(box):
    assert len(b"x" * (400 << 20))


def colour_the_terminal(box):
    print("\x1b[31m")


def say_nothing(box):
    sys.exit(2)


@pytest.mark.parametrize(
    ("does", "verdict"),
    [
        (wait_for_ever, "hang"),
        (spoil_an_input, "lost"),
        (write_elsewhere, "outside"),
        (leave_a_temporary, "partial"),
        (run_a_pickle, "executed"),
        (fail, "traceback"),
        (crash, "traceback"),
        (take_memory, "memory"),
        (colour_the_terminal, "escape"),
        (say_nothing, "wordless"),
        (lambda box: None, None),
    ],
)
def test_a_command_that_ends_badly_is_seen(attack, box, monkeypatch, does, verdict):
    sandbox = attack["sandbox"]
    monkeypatch.setattr(sandbox.cli, "main", lambda: does(box))
    before = box.look()
    run = box.run("transfer", seconds=1.0 if does is wait_for_ever else 60.0)
    assert sandbox.judge_ending(box, run, before) == ([verdict] if verdict else [])


def run_damage(attack, box, monkeypatch, main):
    monkeypatch.setattr(attack["sandbox"].cli, "main", main)
    row = attack["sandbox"].Row("damage", "LoRA, kohya", scale=0.1)
    attack["damage"].CASES[row.case](box, row)
    return row


def test_another_result_without_a_word_is_silent(attack, box, monkeypatch):
    calls = box.work / "calls"

    def main():
        first = not calls.exists()
        calls.write_text("x")
        weight = {"x": torch.zeros(2) if first else torch.ones(2)}
        save_file(weight, box.out / "moved.safetensors")

    row = run_damage(attack, box, monkeypatch, main)
    assert row.runs == row.counts["silent"] == 12 and row.bad == 12 and len(row.findings) == 4


def test_a_refusal_and_the_same_result_are_no_findings(attack, box, monkeypatch):
    def main():
        try:
            whole = load_file(box.inputs / "lora.safetensors")
        except Exception as error:
            print(error)
            sys.exit(2)
        whole = {k: t for k, t in whole.items() if "transformer_blocks_2" not in k}
        save_file(whole, box.out / "moved.safetensors")

    row = run_damage(attack, box, monkeypatch, main)
    assert row.counts["refused"] > 3
    # A key that is another is another LoRA: the stand-in does not notice, and that is seen.
    assert row.counts["refused"] + row.counts["equal"] + row.counts["silent"] == row.runs


def test_a_foreign_file_that_is_replaced_is_seen(attack, box, monkeypatch):
    foreign = attack["foreign"]

    def main():
        (box.out / "moved.json").write_text("{}")

    monkeypatch.setattr(attack["sandbox"].cli, "main", main)
    monkeypatch.setitem(foreign.COMMANDS, "writer", lambda box: [])
    row = attack["sandbox"].Row("foreign", "writer")
    foreign.run_command("writer", box, row)
    assert row.runs == row.counts["replaced"] == len(foreign.FOREIGN)


@pytest.mark.slow
def test_a_result_that_is_written_in_two_parts_is_seen_half(attack, box, monkeypatch):
    kills = attack["kills"]

    def main():
        result = box.out / "moved.safetensors"
        save_file({"x": torch.zeros(2)}, box.root / "whole")
        data = (box.root / "whole").read_bytes()
        (box.root / "whole").unlink()
        result.write_bytes(data[:9])
        time.sleep(2)  # long beside what starting a process takes on a busy machine
        result.write_bytes(data)

    monkeypatch.setattr(attack["sandbox"].cli, "main", main)
    row = attack["sandbox"].Row("kills", "writer")
    kills.Kills(lambda box: None, lambda box: [], 8)(box, row)
    assert row.runs == 8 and 2 < row.counts["partial"] <= 8


def test_mutants_are_what_a_hand_would_write(monkeypatch):
    monkeypatch.syspath_prepend(str(ATTACK))
    from mutations import list_mutants

    code = "def f(a, b: int = 2) -> int:\n    if a and b > 1:\n        g(a)\n    return min(a, b)\n"
    changes = {mutant.what for mutant in list_mutants(code)}
    assert {
        "a and b > 1 -> (a or b > 1)",
        "b > 1 -> (b >= 1)",
        "2 -> 3",
        "1 -> 2",
        "g(a) -> pass",
        "min -> max",
        "a and b > 1 -> (not (a and b > 1))",
    } == changes
    assert all(compile(mutant.text, "x", "exec") for mutant in list_mutants(code))


@pytest.mark.slow
def test_mutants_that_no_test_notices_are_listed(tmp_path):
    """In a repository of its own: two functions, one tested."""
    (tmp_path / "python" / "prolora" / "room").mkdir(parents=True)
    (tmp_path / "tests" / "room").mkdir(parents=True)
    for name in ("attack", "support"):
        shutil.copytree(ATTACK.parent / name, tmp_path / "tests" / name)
    code = "def larger(a, b):\n    return max(a, b)\n\n\ndef count(a):\n    return a + 1\n\n\n"
    code += "def unused(a):\n    return a - 1\n"
    for name in ("", "room/"):
        (tmp_path / "python" / "prolora" / f"{name}__init__.py").write_text("")
    (tmp_path / "python" / "prolora" / "room" / "thing.py").write_text(code)
    test = "from prolora.room.thing import count, larger\n\n\n"
    test += "def test_larger():\n    assert larger(1, 2) == 2\n    assert count(5)\n"
    (tmp_path / "tests" / "room" / "test_thing.py").write_text(test)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    words = ["tests/attack/mutants.py", "python/prolora/room/thing.py", "--out", "rows"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment)
    assert done.returncode == 1  # too many live
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["tried"], row["killed"]) == (5, 1)
    assert [line.partition(" ")[2] for line in row["left"]] == [
        "survived: a + 1 -> (a - 1)",
        "survived: 1 -> 2",
        "untested: a - 1 -> (a + 1)",
        "untested: 1 -> 2",
    ]
    assert (tmp_path / "python" / "prolora" / "room" / "thing.py").read_text() == code
