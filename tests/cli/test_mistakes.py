"""What people get wrong: one line says what it is and what to do, and nothing is written.

Most are from a session in which newcomers' mistakes were made one after the other.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from mini import lora_tensors, write_case, write_folder
from safetensors.torch import save_file

BASES = ("--source", "source", "--target", "target")
MOVE = ("transfer", "lora.safetensors", *BASES)
TO = ("-o", "out.safetensors")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder as people have it: LoRAs, bases, and what was downloaded with them."""
    folder = tmp_path_factory.mktemp("room")
    lora, source, _ = write_case(folder)
    (folder / "loras").mkdir()
    for name in "abc":
        shutil.copy(lora, folder / f"loras/{name}.safetensors")
    pickled = {"a.lora_up.weight": torch.ones(2, 2)}
    torch.save(pickled, folder / "old.pt", _use_new_zipfile_serialization=False)
    whole = lora.read_bytes()
    texts = {
        "words.txt": b"trigger words",
        "numbers.json": b'{"a": 1}',
        "foreign.json": b'{"mine": true}',
        "mine.safetensors": whole,
        "names.json": b'{"no.such.module": "no.such.either"}',
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    save_file({"one": torch.ones(4)}, folder / "odd.safetensors")
    broken = lora_tensors()
    next(iter(broken.values()))[0] = torch.nan
    save_file(broken, folder / "diverged.safetensors")
    key = next(iter(lora_tensors())).rpartition(".lora_")[0]
    other = {f"{key}.lora_up.weight": torch.ones(7, 2), f"{key}.lora_down.weight": torch.ones(2, 7)}
    save_file(other, folder / "wide.safetensors")
    weights = next(source.glob("*.safetensors"))
    shutil.copy(weights, folder / "checkpoint.safetensors")
    unrelated = {f"layers.{i}.mlp.weight": torch.randn(8, 8) for i in range(3)}
    write_folder(folder / "unrelated", unrelated)
    return folder


@pytest.fixture
def room(filled, tmp_path, monkeypatch):
    """The same, as the working folder; the test writes elsewhere."""
    monkeypatch.chdir(filled)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return filled


def read_tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Where the shell expands patterns, one in quotes; on Windows one that nothing matches.
PATTERN = "loras/*.ckpt" if os.name == "nt" else "loras/*.safetensors"
MISTAKES = {
    "a missing LoRA": (
        ("transfer", "lorra.safetensors", *BASES, *TO),
        "lorra.safetensors: no such file. Similar here: lora.safetensors",
    ),
    "a LoRA by its id": (
        ("transfer", "someone/my-lora", *BASES, *TO),
        "someone/my-lora: no such file or folder, and the Hugging Face Hub",
    ),
    "a LoRA by its address": (
        ("transfer", "https://civitai.com/api/download/models/1", *BASES, *TO),
        "https://civitai.com/api/download/models/1: an address on the web; download it",
    ),
    "a pattern that reaches us": (
        ("transfer", PATTERN, *BASES, *TO),
        f"{PATTERN}: no such file; no name matches this pattern, or it is in quotes",
    ),
    "a missing base": (
        ("transfer", "lora.safetensors", "--source", "sorce", *BASES[2:], *TO),
        "sorce: no such file, folder or model of the hub (org/name). Similar here: source",
    ),
    "a folder of LoRAs": (
        ("transfer", "loras", *BASES, *TO),
        "loras: a folder of 3 LoRAs; give its files (loras/*.safetensors)",
    ),
    "a base for a LoRA": (
        ("transfer", "source", *BASES, *TO),
        "source: the folder of a model, not a LoRA",
    ),
    "a checkpoint for a LoRA": (
        ("transfer", "checkpoint.safetensors", *BASES, *TO),
        "is a weight of a base model, not a LoRA",
    ),
    "a LoRA for a base": (
        ("transfer", "lora.safetensors", "--source", "lora.safetensors", *BASES[2:], *TO),
        "is a LoRA or a model with one attached",
    ),
    "a file of another kind": (
        ("transfer", "odd.safetensors", *BASES, *TO),
        "odd.safetensors: 1 key is not understood: one",
    ),
    "a diverged training": (("transfer", "diverged.safetensors", *BASES, *TO), "holds NaN or Inf"),
    "a LoRA of another base": (
        ("transfer", "wide.safetensors", *BASES, *TO),
        "wide.safetensors: the LoRA's update of … is 7×7, but that … ; is this LoRA for another",
    ),
    "bases of different models": (
        ("transfer", "lora.safetensors", "--source", "source", "--target", "unrelated", *TO),
        "unrelated",
    ),
    "a program spelled otherwise": (
        ("check", "lora.safetensors", "--for", "comfy"),
        "--for is one of comfyui, a1111 … not 'comfy'; did you mean comfyui?",
    ),
    "a family spelled otherwise": (
        ("check", "lora.safetensors", "--base", "SDX"),
        "model of the hub (org/name); did you mean sdxl?",
    ),
    "a source without a target": (
        ("check", "lora.safetensors", "--source", "source"),
        "give --source and --target, or --base: a verdict",
    ),
    "rounding without a model": (
        ("merge", "loras/a.safetensors", "loras/b.safetensors", *TO, "--stochastic", "3"),
        "--stochastic rounds a model that is baked: give --into BASE",
    ),
    "an output rank above the LoRA's": (
        ("convert", "lora.safetensors", *TO, "--out-rank", "150%"),
        "or one of the rank up to \"100%\", not '150%'",
    ),
    "no output": (MOVE, "-o OUT is missing: where should the new LoRA be written?"),
    "an output of another kind": (
        (*MOVE, "-o", "moved.ckpt"),
        "moved.ckpt: programs read a LoRA from a file that ends in .safetensors: write moved.safet",
    ),
    "an output below a file": ((*MOVE, "-o", "words.txt/x.safetensors"), "is a file, not a folder"),
    "the input for an output": (
        (*MOVE, "-o", "lora.safetensors"),
        "lora.safetensors: would overwrite the input lora.safetensors",
    ),
    "a trained LoRA for an output": (
        (*MOVE, "-o", "mine.safetensors"),
        "choose another name, or allow it with --overwrite",
    ),
    "somebody's file for a report": (
        (*MOVE, *TO, "--report", "foreign.json"),
        "foreign.json: exists, and is not replaced",
    ),
    "the output for a report": (
        (*MOVE, *TO, "--report", "out.safetensors"),
        "the report would replace the LoRA; give it another name",
    ),
    "a folder that cannot be an adapter": (
        (*MOVE, "-o", "words.txt", "--format", "peft"),
        "words.txt: exists, and is not replaced",
    ),
    "a file for several LoRAs": (
        ("transfer", "loras/a.safetensors", "loras/b.safetensors", *BASES, "-o", "x.safetensors"),
        "several LoRAs need a folder; x.safetensors is the name of a file",
    ),
    "no LoRA": (("transfer", *BASES, *TO), "Missing argument 'LORA'"),
    "no source": (("transfer", "lora.safetensors", *BASES[2:], *TO), "Missing option '--source'"),
    "one base for two": (
        ("transfer", "lora.safetensors", "source", *TO),
        "Missing option '--source': bases are given as --source BASE and --target BASE, or after",
    ),
    "one model for two": (("extract", "source", *TO), "Missing argument 'BASE'"),
    "an output option without a name": ((*MOVE, "-o"), "Option '-o' requires an argument"),
    "an empty output": ((*MOVE, "-o", ""), "the path is empty"),
    "a method that is none": (
        (*MOVE, *TO, "--method", "prolroa"),
        "Invalid value for '--method': 'prolroa' is not one of 'auto', 'prolora'",
    ),
    "a program that is none": ((*MOVE, *TO, "--for", "comfyy"), "'comfyy' is not one of"),
    "a device that is none": ((*MOVE, *TO, "--device", "gpu"), "no device is called 'gpu': use"),
    "a misspelt command": (("tranfer",), "No such command 'tranfer'. Did you mean 'transfer'?"),
    "a word for a number": ((*MOVE, *TO, "--strength", "two"), "'--strength' … a valid"),
    "a rank that is none": ((*MOVE, *TO, "--rank", "many"), "takes an integer or a share"),
    "an output rank of zero": ((*MOVE, *TO, "--out-rank", "0"), "--out-rank must be"),
    "a size that is none": ((*MOVE, *TO, "--max-memory", "lots"), "a size such as"),
    "too little memory": ((*MOVE, *TO, "--max-memory", "1kB"), "is too little: the largest weight"),
    "prompts without a fit": ((*MOVE, *TO, "--prompt", "cat"), "No such option"),
    "a map that is missing": (
        (*MOVE, *TO, "--match", "similar"),
        'match takes "auto", "name", "similarity" or a JSON file',
    ),
    "a map of numbers": ((*MOVE, *TO, "--match", "numbers.json"), "'a' leads to '1'; a map of"),
    "a map of other modules": ((*MOVE, *TO, "--match", "names.json"), "the map names.json names"),
    "two LoRAs of one name": (
        ("transfer", "lora.safetensors", "lora.safetensors", *BASES, "-o", "moved"),
        "two inputs would become lora.safetensors",
    ),
    "a pickle for a base": (
        ("check", "lora.safetensors", "--base", "old.pt"),
        "old.pt: a pickle checkpoint in the old format; it can run code when it is loaded",
    ),
    "nothing to look at": (("check",), "Missing argument 'FILE'"),
    "a folder of LoRAs to look at": (("check", "loras"), "name one of them"),
    "a verdict on a missing base": (
        ("check", "lora.safetensors", "--source", "source", "--target", "targte"),
        "targte: no such file, folder or model of the hub (org/name). Similar here: target",
    ),
    "a migration of nothing": (
        ("migrate", "nothing", *BASES, "-o", "moved"),
        "nothing: is no .safetensors file",
    ),
    "a migration to nowhere": (("migrate", "loras", *BASES), "-o FOLDER is missing"),
    "a shard that is none": (
        ("migrate", "loras", *BASES, "-o", "moved", "--shard", "3/2"),
        "shard is a part of the work, as 2/8, not '3/2'",
    ),
}


@pytest.mark.parametrize("words, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(prolora, room, words, said):
    before = read_tree(room)
    code, out, error = prolora(*words)
    assert code == 2 and not out
    lines = [line for line in error.splitlines() if not line.startswith("Try '")]
    assert lines[0].startswith("Error: "), error
    line = lines[0].replace("\\*", "/*")
    assert all(part in line for part in said.split(" … ")), error
    # Behind it only a command to be copied.
    assert all(line.startswith("python -c ") for line in lines[1:]) and len(lines) <= 2
    for leak in ("Traceback", "Value error", r"\n", "Errno", "Error: Error"):
        assert leak not in error
    assert not re.search(r"\b[A-Z]\w+(Error|Format|Mismatch|Option|File)\b:", error)
    assert read_tree(room) == before


def test_a_name_cannot_forge_a_second_line(prolora, room):
    _, _, error = prolora("check", "x\nError: all is well")
    assert len(error.splitlines()) == 1 and r"x\nError: all is well" in error


def test_a_report_goes_to_standard_output_where_that_is_asked_for(prolora, room, tmp_path):
    to = ("-o", tmp_path / "out.safetensors")
    code, out, _ = prolora(*MOVE, *to, "--report", "-", "--method", "copy")
    assert code == 0 and json.loads(out)["totals"]["mapped"] == 8
    assert not Path("-").exists()


@pytest.mark.parametrize(
    "loras", [["lora.safetensors"], ["loras/a.safetensors", "loras/b.safetensors"]]
)
def test_a_missing_folder_of_the_output_is_made(prolora, room, tmp_path, loras):
    folder = tmp_path / "new" / "folder"
    out = folder / "x.safetensors" if len(loras) == 1 else folder
    assert prolora("transfer", *loras, *BASES, "-o", out, "--method", "copy")[0] == 0
    assert len(list(folder.glob("*.safetensors"))) == len(loras)
