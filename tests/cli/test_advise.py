"""`prolora advise`: one screen, JSON, and refusals."""

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from mini import target_along_few, write_folder
from rich.console import Console

from prolora.cli.advise import write_command
from prolora.cli.options import Bases
from prolora.cli.tables import draw_table
from prolora.probe.strength import STRENGTHS, MeasuredStrength, Measurement
from prolora.workflow.tables import tabulate_measured


@pytest.fixture
def tuned(case, tmp_path):
    """The case, with a target that drifted as fine-tunes do."""
    return case[0], case[1], write_folder(tmp_path / "tuned", target_along_few())


def test_one_screen_says_what_to_do(prolora, tuned):
    lora, source, target = tuned
    line = ("advise", lora, "--source", source, "--target", target, "--cache=none")
    code, text, _ = prolora(*line)
    assert code == 0
    assert text.startswith("⚠ This should work in part") and "Most of the LoRA (" in text
    assert len(text.splitlines()) < 10 and "drift" not in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("prolora transfer ") and f"--target {target}" in last
    code, text, _ = prolora(*line, "--explain")
    for part in ("down_blocks.1", "█", "Same lineage", "8 of the LoRA's 12 modules"):
        assert part in text


def test_the_command_that_follows_runs(prolora, tuned, tmp_path, monkeypatch):
    lora, source, target = tuned
    line = ("advise", lora, "--source", source, "--target", target, "--cache", "none", "-q")
    _, text, _ = prolora(*line)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(text.rstrip().splitlines()[-1])
    assert prolora(*command[1:], "-q")[0] == 0 and (tmp_path / command[-1]).exists()


def test_what_was_measured_is_in_the_command():
    bases = Bases("s ource", "t")
    options = {"method": "copy", "strength": 0.85, "match": "a map.json"}
    told = SimpleNamespace(verb="transfer", options=options)
    command = write_command(None, bases, told, "a map.json")
    assert "--source 's ource'" in command
    assert "--method copy --strength 0.85 --match 'a map.json' -o" in command
    fitted = SimpleNamespace(verb="fit", options={"target_steps": 1, "lora_guidance": 2.0})
    command = write_command(Path("x.safetensors"), bases, fitted)
    assert command.startswith("prolora fit x.safetensors --source")
    assert "--target-steps 1 --lora-guidance 2.0 -o x-on-t.safetensors" in command


def test_json_has_everything(prolora, tuned):
    _, source, target = tuned
    code, text, _ = prolora(
        "advise", "--source", source, "--target", target, "--json", "--cache=none"
    )
    advice = json.loads(text)
    assert code == 0 and advice["go"] and advice["lora"] is None and advice["measurement"] is None
    assert advice["stacks"][0]["drifts"] and advice["expected"]["name"] == "changed"
    assert advice["command"].startswith("prolora transfer LORA.safetensors")


def test_samples_without_measuring_and_measuring_without_pipelines_are_refused(prolora, case):
    lora, source, target = case
    line = ("advise", lora, "--source", source, "--target", target, "--cache=none")
    code, _, text = prolora(*line, "--prompt", "a cat")
    assert code == 2 and "add --measure" in text
    code, _, text = prolora(*line, "--measure")
    assert code == 2 and "not a pipeline folder" in text


def test_measured_shares_fit_80_columns_whatever_their_sign():
    shares = dict.fromkeys(STRENGTHS, -0.25) | {1.5: -10.25}
    way = MeasuredStrength(0.07, 0.01, (0.0, 0.13), (-0.34, 0.02), shares, {})
    table = tabulate_measured(Measurement({"auto": way, "copy": way}, 1.0, 12, 72))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(draw_table(table))
    text = console.export_text()
    assert "…" not in text and text.count("-0.25") == 10 and text.count("< −1") == 2
    assert "0.01 [-0.34, 0.02]" in text
