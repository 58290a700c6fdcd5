"""What a kept fit was made from: after any change nothing of it is used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from prolora import FitOptions, fit, open_base
from prolora.errors import OutputError, OutputExists
from prolora.files.safetensors_file import SafetensorsFile
from prolora.fitting.kept_parts import KeptParts

QUICK = FitOptions(("cat", "dog"), images=1, steps=1, fit_steps=1, force=True)


@pytest.fixture(scope="module")
def room(pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a LoRA, the folder of a fit between them, and its result."""
    folder = tmp_path_factory.mktemp("kept") / "room"
    shutil.copytree(pipelines, folder, ignore=shutil.ignore_patterns("other"))
    fit(*ends_of(folder), QUICK, out=folder / "out.safetensors", resume=folder / "kept")
    return folder


def key_of(folder: Path) -> Path:
    """Where a part of a fit between the two pipelines is kept."""
    parts = KeptParts(folder / "kept")
    parts.of_pipelines(open_base(folder / "source"), open_base(folder / "target"))
    return parts._path("fit", "")


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


CHANGES = {
    "norm_eps": lambda x: write_json(x / "source" / "unet" / "config.json", norm_eps=1e-3),
    "tokens": exchange_tokens,
}


def ends_of(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "lora.safetensors", folder / "source", folder / "target"


def is_kept(folder: Path) -> bool:
    """Whether the result is kept for the same fit; it is never replaced."""
    before = (folder / "out.safetensors").read_bytes()
    try:
        report = fit(*ends_of(folder), QUICK, out=folder / "out.safetensors").report
    except OutputExists:
        return False
    assert (folder / "out.safetensors").read_bytes() == before
    return bool(report.before)


def test_a_fit_with_the_same_inputs_is_used_again(changed):
    (changed / "target" / "README.md").write_text("mine")
    (changed / "target" / "unet" / "notes.md").write_text("mine")
    again = fit(*ends_of(changed), QUICK, resume=changed / "kept").report.probe
    assert is_kept(changed) and again.resumed == 1


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_a_pipeline_neither_parts_nor_a_result_are_used(changed, change):
    states, before = {file: file.stat() for file in changed.rglob("*.json")}, key_of(changed)
    CHANGES[change](changed)
    for file, state in states.items():
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not is_kept(changed) and key_of(changed) != before


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
    pick = random.Random(0)
    files, whole = sorted(changed.glob("*/*/*.safetensors")), key_of(changed)
    for _ in range(12):
        path = pick.choice(files)
        opened, before = SafetensorsFile(path), path.read_bytes()
        info = opened.tensors[pick.choice(list(opened.tensors))]
        place = opened.data_start + pick.randrange(info.start, info.stop)
        flipped = before[place] ^ 1 << pick.randrange(8)
        path.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
        assert key_of(changed) != whole
        path.write_bytes(before)
    assert key_of(changed) == whole
