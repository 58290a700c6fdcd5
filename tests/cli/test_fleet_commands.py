"""`prolora plan`, `migrate` and `status`, as they are typed."""

import json
import os
from pathlib import Path

import pytest
import torch
from fleet_files import RATES, write_collection
from safetensors.torch import load_file, save_file

from prolora.workflow.fleet import planning


@pytest.fixture
def planned(prolora, tmp_path, monkeypatch):
    """A plan, and what the command printed."""
    monkeypatch.setattr(planning, "calibrate", lambda: RATES)
    loras, source, targets = write_collection(tmp_path)
    path = tmp_path / "plan.jsonl"
    words = [f"--target={target}" for target in targets]
    code, out, err = prolora("plan", loras, "--source", source, *words, "-o", path)
    assert code == 2, err  # one of the files is no LoRA
    return path, out


def test_a_plan_is_made_done_and_looked_at(prolora, planned, tmp_path):
    plan, printed = planned
    assert "10 moves" in printed and "not a safetensors file" in printed
    assert str(tmp_path / "loras" / "notes.safetensors") in printed
    moved = tmp_path / "moved"
    code, out, _ = prolora("migrate", plan, "-o", moved, "--cache=none", "--shard", "1/2", "--json")
    assert code == 2 and json.loads(out)["totals"]["left"] == 4
    (reason,) = json.loads(out)["reasons"].values()
    assert reason == {"count": 2, "files": [str(tmp_path / "loras" / "notes.safetensors")]}
    code, out, _ = prolora("status", moved, "--json")
    assert (json.loads(out)["done"], json.loads(out)["left"]) == (4, 4)
    code, out, _ = prolora("migrate", plan, "-o", moved, "--cache=none")
    assert code == 2 and "80.0% of the collection moved" in out
    assert "notes.safetensors" in out and str(moved / "failed.jsonl") in out
    page = (moved / "summary.html").read_text().replace("<wbr>", "")
    assert "8 of 10" in page and "not a safetensors file" in page and "notes.safetensors" in page
    code, out, _ = prolora("status", moved)
    assert code == 0 and "8 of 10" in out and "no process" in out and "notes.safetensors" in out


def test_a_result_whose_bytes_were_changed_is_named(prolora, planned, tmp_path):
    moved = tmp_path / "moved"
    prolora("migrate", planned[0], "-o", moved, "--cache=none", "--quiet")
    assert prolora("status", moved, "--verify")[0] == 0
    result = next((moved / "loras" / "target").glob("b*.safetensors"))
    content = bytearray(result.read_bytes())
    content[-5] ^= 1
    result.write_bytes(content)
    assert prolora("status", moved)[0] == 0
    code, out, _ = prolora("status", moved, "--verify")
    assert code == 2 and str(result) in out and "not those that were written" in out
    result.unlink()
    assert prolora("migrate", planned[0], "-o", moved, "--cache=none", "--quiet")[0] == 2
    assert prolora("status", moved, "--verify")[0] == 0


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_plan_that_is_no_file_is_refused_at_once(prolora, tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    code, _, err = prolora("migrate", path, "-o", tmp_path / "moved")
    assert code == 2 and "not a regular file" in err and not (tmp_path / "moved").exists()


def test_what_a_run_does_not_take_is_refused_before_anything_is_made(prolora, planned, tmp_path):
    for words, message in (
        (["--shard", "3/2"], "as 2/8"),
        (["--workers", "2"], "engine ray"),
        (["--retries=-1"], "retries"),
    ):
        code, _, err = prolora("migrate", planned[0], "-o", tmp_path / "moved", *words)
        assert code == 2 and message in err and not (tmp_path / "moved").exists()


def test_a_folder_without_a_migration_is_named(prolora, tmp_path):
    code, _, err = prolora("status", tmp_path)
    assert code == 2 and "no migration" in err


def test_a_quiet_command_still_says_what_it_refused(prolora, planned, tmp_path):
    line = ("migrate", planned[0], "-o", tmp_path / "moved", "--cache=none", "-q")
    code, text, errors = prolora(*line)
    assert code == 2 and not text
    assert "2 not moved" in errors and "notes.safetensors" in errors


@pytest.mark.parametrize("damage", ["gate", "name"])
def test_a_lora_that_moved_in_part_is_no_success(prolora, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(planning, "calibrate", lambda: RATES)
    loras, source, targets = write_collection(tmp_path)
    (loras / "notes.safetensors").unlink()
    tensors = load_file(loras / "a.safetensors")
    if damage == "gate":
        beside = next(iter(tensors)).partition(".")[0]
        tensors[f"{beside}.lora_gate"] = torch.ones(3)
    else:
        name = next(key for key in tensors if key.endswith(".alpha"))
        tensors[name.replace("attn1", "attn9")] = tensors.pop(name)
    save_file(tensors, loras / "a.safetensors")
    plan, moved = tmp_path / "plan.jsonl", tmp_path / "moved"
    assert prolora("plan", loras, "--source", source, "--target", targets[0], "-o", plan)[0] == 0
    for is_known in (False, True, False):  # nor is it one where it is there already
        for journal in moved.glob("journal/*" if not is_known else "nothing"):
            journal.unlink()  # as if the process was killed before it wrote it down
        code, out, _ = prolora("migrate", plan, "-o", moved, "--cache=none")
        assert code == 4 and "could not be read" in out and str(loras / "a.safetensors") in out
