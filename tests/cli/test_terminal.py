"""What files say is printed as it is: neither rich nor the terminal obeys it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from lora_files import read_lora
from mini import BLOCK, lora_tensors, source_weights, target_weights, write_folder
from safetensors.torch import save_file

from prolora.cli.console import PlainConsole, make_printable, weight_stages

NO_SUCH_NAMES = pytest.mark.skipif(os.name == "nt", reason="Windows takes no such names")

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\x7f"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


PROGRAM = """
import sys, json
from prolora.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    try:
        code = main() or 0
    except SystemExit as end:
        code = end.code or 0
    print(f"\\0{code}\\0", end="", flush=True)
    print("\\0", end="", file=sys.stderr, flush=True)
"""


def run_in_turn(lines, encoding):
    """(Exit code, output, errors) of several commands in one process: most of each is its start."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    order = json.dumps([[str(word) for word in line] for line in lines])
    words = [sys.executable, "-c", PROGRAM, order]
    run = subprocess.run(words, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    outputs, errors = run.stdout.split(b"\0"), run.stderr.split(b"\0")
    return list(zip(map(int, outputs[1::2]), outputs[::2], errors, strict=False))


@pytest.mark.parametrize(
    "name",
    ["[sdxl] style", "[bold]x [link=y]z", pytest.param(":smile: a\\[b] c", marks=NO_SUCH_NAMES)],
)
def test_brackets_in_file_names_are_no_markup(prolora, case, tmp_path, name):
    lora, source, target = case
    named = lora.rename(tmp_path / f"{name}.safetensors")
    code, text, _ = prolora("check", named)
    assert code == 3 and f"{name}.safetensors" in text
    bases = ("--source", source.rename(tmp_path / f"s {name}"), "--target", target)
    out = tmp_path / f"{name} out.safetensors"
    code, text, _ = prolora("transfer", named, *bases, "-o", out)
    assert code == 0 and out.is_file() and f"wrote {out}" in text
    code, _, text = prolora("transfer", named, *bases, "-o", named)
    assert code == 2 and f"{name}.safetensors" in text
    folder = tmp_path / f"moved {name}"
    folder.mkdir()
    again = shutil.copy(named, tmp_path / f"{name} again.safetensors")
    code, text, _ = prolora("transfer", named, again, *bases, "-o", folder, "--cache=none")
    assert code == 0 and name.split()[0] in text


@pytest.mark.parametrize("tail", ["[/b]", "[red]", ESCAPES])
def test_keys_are_neither_markup_nor_commands(prolora, case, tmp_path, tail):
    _, source, target = case
    bad = tmp_path / "bad.safetensors"
    tensors = lora_tensors()
    tensors[f"lora_unet_x{tail}.lora_up.weight"] = torch.ones(24, 4)
    save_file(tensors, bad)
    bases = ("--source", source, "--target", target)
    for line in (
        ("check", bad),
        ("transfer", bad, *bases, "-o", tmp_path / "out.safetensors"),
        ("transfer", bad, bad.rename(bad.with_name("b.safetensors")), *bases, "-o", tmp_path),
    ):
        code, out, err = prolora(*line)
        assert code in (0, 2) and not CONTROLS.search(out + err), line


@NO_SUCH_NAMES
def test_control_characters_reach_no_terminal(prolora, tmp_path):
    name = ESCAPES
    lora = tmp_path / f"{name}.safetensors"
    metadata = {
        "ss_sd_model_name": f"base{ESCAPES}",
        "ss_tag_frequency": f'{{"x": {{"trigger{ESCAPES!r}": 5}}}}'.replace("'", ""),
        "ss_base_model_version": f"sdxl{ESCAPES}",
    }
    save_file(lora_tensors(), lora, metadata)
    source = write_folder(tmp_path / f"source{name}", source_weights())
    target = write_folder(tmp_path / f"target{name}", target_weights())
    bases = ("--source", source, "--target", target)
    cache = ("--cache", tmp_path / f"cache{name}")
    said = ""
    for line in (
        ("check", lora),
        ("check", source),
        ("check", lora, *bases),
        ("transfer", lora, *bases, "-o", tmp_path / f"out{name}.safetensors", *cache),
        ("transfer", lora, *bases, "-o", lora, *cache),
        ("transfer", lora, *bases, "--method", "prolora", "-o", tmp_path / "o.safetensors", *cache),
        ("check", tmp_path / f"missing{name}"),
    ):
        code, out, err = prolora(*line)
        assert code in (0, 1, 2, 3) and not CONTROLS.search(out + err), (line, out, err)
        said += out + err
    assert r"\x1b]0;title\x07" in said and r"\u202e" in said


def test_control_characters_of_a_wrong_command_line_are_not_obeyed(prolora):
    for line in (("check", "a", f"--b{ESCAPES}"), ("transfer", f"--{ESCAPES}"), (f"x{ESCAPES}",)):
        code, out, err = prolora(*line)
        assert code == 2 and not out and "for help" in err and not CONTROLS.search(err), line
        assert r"\x1b[2J" in err


@NO_SUCH_NAMES
@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cp1252", "utf-8"))]
)
def test_no_encoding_of_the_output_stops_a_command(case, tmp_path, encoding, monkeypatch):
    """Nor do control characters in the name of the cache, which is logged, reach the terminal."""
    (tmp_path / "file\x1b[2J").write_text("")
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "file\x1b[2J" / "cache"))
    odd = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.safetensors")
    lora, source, target = case
    with contextlib.suppress(OSError):  # some file systems take Unicode names only
        shutil.copy(lora, odd)
    lora = lora.rename(tmp_path / "ユニコード Ж.safetensors")
    out = tmp_path / "out Ж.safetensors"
    bases = ("--source", source, "--target", target)
    moved, planned, helped, wrong, named = run_in_turn(
        [
            ("transfer", lora, *bases, "-o", out, "--method", "prolora"),
            ("transfer", lora, *bases, "--dry-run"),
            ("transfer", "--help"),
            ("transfer", lora, *bases, "-o", lora),
            ("check", odd),
        ],
        encoding,
    )
    assert moved[0] == 0 and b"nothing is kept" in moved[2], moved[2]
    assert b"\x1b" not in moved[2] and rb"\x1b[2J" in moved[2]
    assert rb"caf\udce9.safetensors" in b"".join(named[1:])
    assert named[0] == (3 if os.path.exists(odd) else 2)
    assert len(read_lora(out).updates) == 8
    text = moved[1].decode(encoding)
    mark = "⚠" if encoding == "utf-8" else "Careful:"
    assert text.startswith(f"{mark} This should work in part")
    arrow = "→" if encoding == "utf-8" else "->"
    assert f"source {arrow} target" in planned[1].decode(encoding)
    assert helped[0] == 0 and b"--method" in helped[1]
    assert wrong[0] == 2 and b"would overwrite the input" in wrong[2]


def test_printable_text_is_left_alone():
    for text in ("plain", "Ünïcodé ユニ 😀", BLOCK.format(0, "attn1.to_q"), "[x]\\[y]"):
        assert make_printable(text) == text
    assert make_printable("a\r\n\tb") == r"a\r\n\tb"
    assert make_printable("Φ ≥ 0 → Ж", "ascii") == "Phi >= 0 -> ?"


def test_a_plain_console_keeps_its_own_styles(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    PlainConsole().print("[b]x\x1b[1m", style="red")
    assert capsys.readouterr().out == "\x1b[31m[b]x\\x1b[1m\x1b[0m\n"


def test_one_bar_over_all_stages_never_goes_back_and_is_full_at_the_end():
    shown = []
    stages = {"reading": 0.1, "checking": 0.2, "": 0.6, "writing": 0.1}
    show = weight_stages(lambda done, total, _: shown.append(done / total), stages)
    for step in ((4, 8, "checking a"), (8, 8, "checking b"), (0, 8, "down.0"), (8, 8, "down.1")):
        show(*step)
    show(1, 1, "writing out")
    assert shown == pytest.approx([0.2, 0.3, 0.3, 0.9, 1.0])
    show = weight_stages(lambda done, total, _: shown.append(done / total), stages)
    shown.clear()
    for step in (
        (8, 8, "LoRA 3 of 4: down"),
        (0, 1, "LoRA 4 of 4: reading x"),
        (1, 1, "LoRA 4 of 4: writing"),
    ):
        show(*step)
    assert shown == pytest.approx([0.725, 0.75, 1.0])
