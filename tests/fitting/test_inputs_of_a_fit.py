"""What a kept fit was made from: after any change nothing of it is used."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file, save_file

from prolora import FitOptions, fit
from prolora import fitting as probe
from prolora.bases import open_base
from prolora.errors import OutputError, OutputExists
from prolora.files.safetensors_file import SafetensorsFile
from prolora.fitting.kept_parts import KeptParts

QUICK = FitOptions(("cat", "dog"), images=1, steps=1, fit_steps=1, force=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a LoRA, the folder of a fit between them, and its result."""
    folder = tmp_path_factory.mktemp("kept")
    tiny.save_ends(folder)
    fit(*ends(folder), QUICK, out=folder / "out.safetensors", resume=folder / "kept")
    return folder


def fitted(folder: Path) -> probe.ProbeReport:
    return fit(*ends(folder), QUICK, resume=folder / "kept").report.probe


@pytest.fixture
def changed(room: Path, tmp_path: Path) -> Path:
    """A copy to change something in."""
    return Path(shutil.copytree(room, tmp_path / "room"))


def write_json(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def exchange_tokens(folder: Path) -> None:
    tokens = next((folder / "source" / "tokenizer").glob("tokenizer.json"), None)
    tokens = tokens or folder / "source" / "tokenizer" / "vocab.json"
    tokens.write_text(tokens.read_text().replace('"a"', '"_"', 1).replace('"b"', '"a"', 1))


def change_a_number(folder: Path) -> None:
    weights = folder / "target" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})


CHANGES = {
    "norm_eps": lambda x: write_json(x / "source" / "unet" / "config.json", norm_eps=1e-3),
    "tokens": exchange_tokens,
    "a number": change_a_number,
}


def ends(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "lora.safetensors", folder / "source", folder / "target"


def is_kept(folder: Path) -> bool:
    """Whether the result is kept for the same fit; it is never replaced."""
    before = (folder / "out.safetensors").read_bytes()
    try:
        report = fit(*ends(folder), QUICK, out=folder / "out.safetensors").report
    except OutputExists:
        return False
    assert (folder / "out.safetensors").read_bytes() == before
    return bool(report.before)


def test_a_fit_with_the_same_inputs_is_used_again(changed):
    (changed / "target" / "README.md").write_text("mine")
    (changed / "target" / "unet" / "notes.md").write_text("mine")
    assert is_kept(changed) and fitted(changed).resumed == 1


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_a_pipeline_neither_parts_nor_a_result_are_used(changed, change):
    states = {file: file.stat() for file in changed.rglob("*.json")}
    CHANGES[change](changed)
    for file, state in states.items():
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not is_kept(changed)
    before = {file.name: file.read_bytes() for file in (changed / "kept").iterdir()}
    assert fitted(changed).resumed == 0
    after = {file.name: file.read_bytes() for file in (changed / "kept").iterdir()}
    assert after.items() > before.items() and len(after) == 2 * len(before)


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_after_a_change_of_a_package_nothing_is_used(tmp_path, package, monkeypatch):
    told, numbers = importlib.metadata.version, {"a": torch.ones(2)}
    KeptParts(tmp_path).store("one", "key", numbers)
    assert KeptParts(tmp_path).recall("one", "key")

    def version(name: str) -> str:
        return "9.9" if name == package else told(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert KeptParts(tmp_path).recall("one", "key") is None


def test_nothing_is_written_through_a_link_in_the_folder(tmp_path):
    kept, victim = KeptParts(tmp_path / "kept"), tmp_path / "victim.safetensors"
    kept.store("fit", "key", {"a": torch.ones(2)})
    victim.write_bytes(b"mine")
    (linked,) = (tmp_path / "kept").iterdir()
    linked.unlink()
    linked.symlink_to(victim)
    for use in (kept.recall, lambda *key: kept.store(*key, {"a": torch.ones(2)})):
        with pytest.raises(OutputError, match="link"):
            use("fit", "key")
    assert victim.read_bytes() == b"mine"


def test_one_value_of_any_tensor_is_noticed(changed):
    """One bit of one value: nothing is known by samples, and no time has to differ."""
    pick, sides = random.Random(0), [open_base(changed / side) for side in ("source", "target")]

    def key() -> Path:
        parts = KeptParts(changed / "kept")
        parts.of_pipelines(*sides)
        return parts._path("fit", "")

    files, whole = sorted(changed.glob("*/*/*.safetensors")), key()
    for _ in range(12):
        path = pick.choice(files)
        tensors, before = SafetensorsFile(path).tensors, path.read_bytes()
        info = tensors[pick.choice(list(tensors))]
        place = info.start + pick.randrange(math.prod(info.shape) * info.dtype.itemsize)
        flipped = before[place] ^ 1 << pick.randrange(8)
        path.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
        assert key() != whole
        path.write_bytes(before)
    assert key() == whole
