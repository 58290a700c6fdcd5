"""SDXL to SSD-1B with real names, at an eighth of the width; bench/ runs the same at full size."""

import diffusers_check
import pytest
import sdxl
import torch
from checkpoints import name_in_ldm
from safetensors.torch import save_file

import prolora


@pytest.mark.slow
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_attaches_all_272_modules_without_a_warning(tmp_path, format):
    found = diffusers_check.check(tmp_path, 8, format, "prolora")
    assert found["computed"] == found["attached"] == 272 and found["same modules"]
    assert found["warnings"] == []
    assert found["largest relative difference"] < 1e-6


@pytest.mark.slow
def test_a_single_file_base_gives_the_lora_that_the_folder_gives(tmp_path):
    files = sdxl.write_all(tmp_path, scale=16)
    singles = []
    for folder in (files.source, files.target):
        base = prolora.open_base(folder)
        singles.append(tmp_path / f"{folder.name}.safetensors")
        stored = {
            f"model.diffusion_model.{name_in_ldm(name)}.weight": base.read(name)
            for name in base.shapes
        }
        save_file(stored, singles[-1])
    wanted = prolora.transfer(files.lora, files.source, files.target)
    found = prolora.transfer(files.lora, *singles)
    assert len(found.adapter.updates) == 272
    for name, update in wanted.adapter.updates.items():
        assert torch.equal(update.up, found.adapter.updates[name].up)
