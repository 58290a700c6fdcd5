"""Damaged weights and files are refused by name, before anything is sampled."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from fitting import FlowSide, fit_models
from safetensors.torch import load_file, save_file
from test_probe import lora, permuted, source

from prolora import FitOptions, ProLoRAError, fit
from prolora.errors import NonFiniteWeights

__all__ = ["lora", "source"]  # fixtures

BROKEN = [float("nan"), float("-inf"), 1e30]
QUICK = FitOptions(("cat", "dog"), images=1, steps=1, fit_steps=1, force=True)


@pytest.fixture
def target(ends: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(ends[2], tmp_path / "target"))


@pytest.fixture
def forbidden(monkeypatch) -> None:
    monkeypatch.setattr(FlowSide, "sample", lambda *_: pytest.fail("sampled"))


@pytest.mark.parametrize("value", BROKEN)
def test_one_broken_number_of_a_model_or_of_the_lora_is_refused_before_sampling(
    source, lora, value, forbidden
):
    for side in ("source", "target"):
        models = {"source": copy.deepcopy(source), "target": permuted(source)}
        models[side].blocks[1].up.bias.data[3] = value
        words = rf"blocks\.1\.up\.bias of the {side}: 1 of 24 .*3"
        with pytest.raises(NonFiniteWeights, match=words):
            fit_models(*models.values(), lora)
    lora["blocks.1.up"].down[1, 2] = value
    with pytest.raises(NonFiniteWeights, match=r"the LoRA's update of blocks\.1\.up"):
        fit_models(source, source, lora)


FILES = {
    "unet/diffusion_pytorch_model.safetensors": float("nan"),
    "vae/diffusion_pytorch_model.safetensors": 1e30,
    "text_encoder/model.safetensors": float("-inf"),
}


@pytest.mark.parametrize("file", FILES)
def test_one_broken_weight_of_a_pipeline_is_refused_before_sampling(
    ends, target, file, monkeypatch
):
    path = target / file
    tensors = load_file(path)
    # One that moving by weights does not read.
    name = next(key for key in tensors if key.endswith(("norm.weight", "norm_out.weight", "bias")))
    tensors[name].view(-1)[0] = FILES[file]
    save_file(tensors, path, {"format": "pt"})

    @functools.wraps(UNet2DConditionModel.forward)  # its signature is looked at
    def forward(*_, **__):
        pytest.fail("it ran")

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with pytest.raises(NonFiniteWeights) as refusal:
        fit(*ends[:2], target, QUICK)
    assert name in str(refusal.value) and str(path.parent) in str(refusal.value)


def test_a_mask_of_minus_infinity_that_is_stored_is_no_damage(source, lora, forbidden):
    source.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    source.register_buffer("scale", torch.ones(2))
    source.mask[0, 0], source.scale[0] = 0.0, float("nan")
    with pytest.raises(NonFiniteWeights, match="scale of the source"):
        fit_models(source, permuted(source), lora)


def test_a_model_whose_predictions_overflow_is_refused_in_words(source, lora):
    """Each weight is sound; what they make together is not."""
    for block in source.blocks:
        block.down.weight.data *= 1e14
    source.leave.weight.data *= 1e14
    with pytest.raises(ProLoRAError, match=r"source.* NaN or Inf"):
        fit_models(source, permuted(source), lora, fit_steps=1)


@pytest.mark.parametrize("change", [{"vae": []}, {"unet": ["diffusers"]}, {"scheduler": True}])
def test_a_wrong_kind_in_the_index_of_a_pipeline_is_refused(ends, target, change):
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ProLoRAError) as refusal:
        fit(*ends[:2], target)
    assert "Error" not in str(refusal.value)
