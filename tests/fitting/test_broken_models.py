"""Damaged weights and files are refused by name, before anything is sampled."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diagonal import pair_up
from diffusers import UNet2DConditionModel
from fitting import FlowSide, fit_models
from safetensors.torch import load_file, save_file
from test_probe import lora, permuted, source

from prolora import FitOptions, ProLoRAError, fit
from prolora.errors import NonFiniteWeights

__all__ = ["lora", "source"]  # fixtures

BROKEN = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30]
QUICK = FitOptions(("cat", "dog"), images=1, steps=1, fit_steps=1, force=True)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    tiny.save_ends(tmp_path)
    return tmp_path


@pytest.fixture
def forbidden(monkeypatch) -> None:
    monkeypatch.setattr(FlowSide, "sample", lambda *_: pytest.fail("sampled"))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("side", ["source", "target"])
def test_one_broken_weight_of_a_module_is_refused_before_sampling(
    source, lora, side, value, forbidden
):
    models = {"source": source, "target": permuted(source)}
    models[side].blocks[1].up.bias.data[3] = value
    with pytest.raises(NonFiniteWeights, match=rf"blocks\.1\.up\.bias of the {side}: 1 of 24 .*3"):
        fit_models(*models.values(), lora)


@pytest.mark.parametrize("value", BROKEN)
def test_one_broken_number_of_the_lora_is_refused_before_sampling(source, lora, value, forbidden):
    lora["blocks.1.up"].down[1, 2] = value
    with pytest.raises(NonFiniteWeights, match=r"the LoRA's update of blocks\.1\.up"):
        fit_models(source, source, lora)


FILES = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]


@pytest.mark.parametrize(("file", "value"), pair_up(FILES, BROKEN))
def test_one_broken_weight_of_a_pipeline_is_refused_before_sampling(room, file, value, monkeypatch):
    path = room / "target" / file
    tensors = load_file(path)
    # One that moving by weights does not read.
    name = next(key for key in tensors if key.endswith(("norm.weight", "norm_out.weight", "bias")))
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})

    @functools.wraps(UNet2DConditionModel.forward)  # its signature is looked at
    def forward(*_, **__):
        pytest.fail("it ran")

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with pytest.raises(NonFiniteWeights) as refusal:
        fit(room / "lora.safetensors", room / "source", room / "target")
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


@pytest.mark.parametrize(
    "change", [{"vae": []}, {"unet": ["diffusers"]}, {"scheduler": True}, {"unet": [None, None]}]
)
def test_a_wrong_kind_in_the_index_of_a_pipeline_is_refused(room, change):
    index = room / "target" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ProLoRAError) as refusal:
        fit(room / "lora.safetensors", room / "source", room / "target")
    assert "Error" not in str(refusal.value)
