"""What a kept fit was made from: every change is seen by the next run, and named."""

from __future__ import annotations

import importlib.metadata
import json
import math
import random
import shutil
import warnings
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file, save_file
from test_probe import lora, permuted, run, source
from torch import nn

from prolora import FitOptions, LowRank, fit, probe
from prolora.bases import open_base
from prolora.errors import OutputError
from prolora.files.safetensors_file import SafetensorsFile
from prolora.probe import pipelines
from prolora.workflow.by_fitting.common_parts import CommonParts

__all__ = ["lora", "source"]  # fixtures

QUICK = FitOptions(("cat", "dog"), images=1, steps=1, fit_steps=1, force=True)
JOINT = {"fit_steps": 2, "rank": 3, "force": True}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a LoRA, and the folder of a fit between them."""
    folder = tmp_path_factory.mktemp("kept")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "source")
        unet = pipelines.open_pipeline(folder / "source").denoiser
        tiny.save(folder / "target", seed=5)
        tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, ("attn1.to_v",)))
        fitted(folder)
    return folder


def fitted(folder: Path, kept: Path | None = None) -> probe.ProbeReport:
    asked = {**vars(QUICK), "resume": kept or folder / "kept"}
    files = folder / "lora.safetensors", folder / "source", folder / "target"
    return fit(*files, FitOptions(**asked)).report.probe


@pytest.fixture
def changed(room: Path, tmp_path: Path) -> Path:
    """A copy to change something in."""
    return Path(shutil.copytree(room, tmp_path / "room"))


def refused(folder: Path) -> str:
    before = {file.name: file.read_bytes() for file in (folder / "kept").iterdir()}
    with pytest.raises(OutputError) as refusal:
        fitted(folder)
    assert {file.name: file.read_bytes() for file in (folder / "kept").iterdir()} == before
    return str(refusal.value)


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


SETTINGS = {
    "unet/config.json": {"attention_head_dim": 1},
    "text_encoder/config.json": {"hidden_act": "gelu"},
    "scheduler/scheduler_config.json": {"clip_sample": True},
    "tokenizer/tokenizer_config.json": {"pad_token": "a"},
    "vae/config.json": {"layers_per_block": 2},
    "model_index.json": {"requires_safety_checker": True},
}


def test_a_fit_with_the_same_inputs_is_used_again(changed):
    assert fitted(changed).resumed == 1


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("file", SETTINGS)
def test_a_changed_setting_is_seen_and_named(changed, side, file):
    ((setting, value),) = SETTINGS[file].items()
    edit(changed / side / file, **SETTINGS[file])
    message = refused(changed)
    assert f"the {side}'s {file}: {setting} " in message
    assert f"→ {json.dumps(value)}" in message or "is new" in message
    assert "delete the folder" in message


def test_changed_content_of_a_file_is_seen_and_the_file_is_named(changed):
    """A tokenizer with two words exchanged, and a text encoder with one other number."""
    tokens = next((changed / "source" / "tokenizer").glob("tokenizer.json"), None)
    tokens = tokens or changed / "source" / "tokenizer" / "vocab.json"
    tokens.write_text(tokens.read_text().replace('"a"', '"_"', 1).replace('"b"', '"a"', 1))
    weights = changed / "target" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    message = refused(changed)
    assert f"the source's tokenizer/{tokens.name} changed" in message
    assert "the target's text_encoder/model.safetensors changed" in message


def test_files_that_came_and_went_are_named(changed):
    (changed / "source" / "tokenizer" / "added_tokens.json").write_text("{}")
    unet = changed / "target" / "unet"
    unet.joinpath("diffusion_pytorch_model.safetensors").rename(
        unet / "diffusion_pytorch_model.fp16.safetensors"
    )
    message = refused(changed)
    assert "the source's tokenizer/added_tokens.json is new" in message
    assert "the target's unet/diffusion_pytorch_model.safetensors is gone" in message


def test_notes_beside_a_pipeline_change_nothing(changed):
    (changed / "target" / "README.md").write_text("mine")
    (changed / "target" / "unet" / "notes.md").write_text("mine")
    (changed / "target").rename(changed / "elsewhere")
    (changed / "elsewhere").rename(changed / "target")
    assert fitted(changed).resumed == 1


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_another_version_of_a_package_is_seen_and_named(changed, package, monkeypatch):
    told = importlib.metadata.version

    def version(name: str) -> str:
        return "9.9" if name == package else told(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = refused(changed)
    assert f"{package} " in message and "→ 9.9" in message


def test_a_change_of_modules_in_memory_is_seen_and_named(source, lora, tmp_path):
    target = permuted(source)
    kept = {"resume": tmp_path / "kept", "described": "three steps"}
    run(source, target, lora, **kept, **JOINT)
    source.blocks[1].norm.eps = 1e-2
    with pytest.raises(OutputError, match=r"the source's blocks\.1\.norm: eps 1e-05 → 0"):
        run(source, target, lora, **kept, **JOINT)
    source.blocks[1].norm.eps = 1e-5
    assert run(source, target, lora, **kept, **JOINT).report.resumed == 1
    target.blocks[0].down.bias.data[3] += 1e-6
    with pytest.raises(OutputError, match=r"the target's weights blocks\.0\.down\.bias changed"):
        run(source, target, lora, **kept, **JOINT)
    target.blocks[0].down.bias.data[3] -= 1e-6


def test_a_module_of_another_class_with_the_same_weights_is_seen(source, lora, tmp_path):
    class Gelu(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(super().forward(x))

    target = permuted(source)
    kept = {"resume": tmp_path / "kept", "described": "three steps"}
    run(source, target, lora, **kept, **JOINT)
    target.blocks[2].norm = Gelu(12, elementwise_affine=False)
    with pytest.raises(OutputError, match=r"the target's blocks\.2\.norm: class"):
        run(source, target, lora, **kept, **JOINT)


def test_a_folder_that_holds_other_things_is_refused_and_left_alone(source, lora, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        run(source, source, lora, resume=tmp_path, described="three steps", **JOINT)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[]", '{"made_from": {"source": 3}}'])
def test_a_damaged_or_foreign_list_of_inputs_is_refused_and_left_alone(
    source, lora, tmp_path, text
):
    kept = {"resume": tmp_path, "described": "three steps"}
    run(source, source, lora, **kept, **JOINT)
    (listed,) = tmp_path.glob("*.json")
    listed.write_text(text)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=listed.name):
        run(source, source, lora, **kept, **JOINT)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_results_without_their_list_of_inputs_are_refused(source, lora, tmp_path):
    kept = {"resume": tmp_path, "described": "three steps"}
    run(source, source, lora, **kept, **JOINT)
    next(tmp_path.glob("*.json")).unlink()
    with pytest.raises(OutputError, match="calls-"):
        run(source, source, lora, **kept, **JOINT)


def test_nothing_is_written_through_a_link_in_the_folder(source, lora, tmp_path):
    kept = {"resume": tmp_path / "kept", "described": "three steps"}
    run(source, source, lora, **kept, **JOINT)
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(b"mine")
    linked = next((tmp_path / "kept").glob("joint-*"))
    linked.unlink()
    linked.symlink_to(victim)
    with pytest.raises(OutputError, match="link"):
        run(source, source, lora, **kept, **JOINT)
    assert victim.read_bytes() == b"mine"


def test_another_lora_uses_what_the_bases_were_asked(source, lora, tmp_path):
    kept = {"resume": tmp_path, "described": "three steps"}
    run(source, permuted(source), lora, **kept, **JOINT)
    weaker = {name: LowRank(0.5 * update.up, update.down) for name, update in lora.items()}
    assert run(source, permuted(source), weaker, **kept, **JOINT).report.resumed == 0
    assert len(list(tmp_path.glob("calls-source-*"))) == 2


def test_one_value_of_any_tensor_is_noticed_before_a_model_is_loaded(changed):
    """One bit of one value: nothing is known by samples, and no time has to differ."""
    pick, sides = random.Random(0), [open_base(changed / side) for side in ("source", "target")]
    files = sorted(changed.glob("*/*/*.safetensors"))
    for _ in range(100):
        path = pick.choice(files)
        tensors, before = SafetensorsFile(path).tensors, path.read_bytes()
        info = tensors[pick.choice(list(tensors))]
        place = info.start + pick.randrange(math.prod(info.shape) * info.dtype.itemsize)
        flipped = before[place] ^ 1 << pick.randrange(8)
        path.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
        with pytest.raises(OutputError, match=f"{path.parent.name}/{path.name} changed"):
            CommonParts(changed / "kept").check_folder(*sides)
        path.write_bytes(before)
    CommonParts(changed / "kept").check_folder(*sides)
