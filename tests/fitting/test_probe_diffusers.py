"""Probing on diffusers' own modules: blocks are recognised, gates and text streams are handled."""

from __future__ import annotations

import copy
import re

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from fitting import fit_models
from torch import nn

from prolora import LowRank, adapters

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "guidance_embeds": False,
    "axes_dims_rope": [2, 2, 4],
}
UNET = {
    **tiny.UNET,
    **{
        "in_channels": 1,
        "out_channels": 1,
        "cross_attention_dim": 8,
        "use_linear_projection": True,
    },
}


def loras(model: nn.Module, pattern: str) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name):
            m, n = module.weight.shape
            up = 0.1 * torch.randn(m, 2, generator=generator)
            updates[name] = LowRank(up, torch.randn(2, n, generator=generator) / n**0.5)
    return updates


def transfer(model: nn.Module, lora: dict[str, LowRank], sampler, **options):
    target = copy.deepcopy(model)
    return fit_models(model, target, lora, sampler(model), sampler(target), **options)


def test_a_flux_transformer_takes_the_change_in_both_kinds_of_blocks():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX)
    ids = torch.zeros(4, 3)
    text = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(2))

    def sampler(run):
        def sample(seed: int) -> None:
            x = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(seed))
            for t in (1.0, 0.5):
                x = (
                    x
                    - 0.5
                    * run(
                        hidden_states=x,
                        encoder_hidden_states=text,
                        pooled_projections=text.mean(1),
                        timestep=torch.full((6,), t),
                        img_ids=ids,
                        txt_ids=torch.zeros(3, 3),
                        return_dict=False,
                    )[0]
                )

        return sample

    pattern = r".*blocks\.\d+\.(attn\.(to_q|to_v|to_out\.0|add_v_proj)|ff\.net\.2|proj_out)"
    lora = loras(model, pattern)
    result = transfer(model, lora, sampler, fit_steps=12)
    assert result.report.gate.share["all"] > 0.8
    assert set(lora) <= set(result.adapter.updates)


@pytest.mark.slow
def test_a_unet_takes_the_change_at_every_resolution_and_the_lora_can_be_saved(tmp_path):
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET)
    text = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(2))

    def sampler(run):
        def sample(seed: int) -> None:
            x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            for t in (900.0, 400.0):
                x = x - 0.5 * run(x, torch.full((6,), t), encoder_hidden_states=text).sample

        return sample

    lora = loras(model, r".*transformer_blocks\.0\.(attn[12]\.to_(v|out\.0)|ff\.net\.2)")
    result = transfer(model, lora, sampler, fit_steps=12)
    assert result.report.gate.share["all"] > 0.8
    assert set(result.adapter.updates) == set(lora)
    result.save(tmp_path / "moved.safetensors")
    back = adapters.read_adapter(tmp_path / "moved.safetensors")
    name = next(iter(lora))
    torch.testing.assert_close(
        back.updates[name].dense(), result.adapter.updates[name].dense(), atol=1e-6, rtol=1e-5
    )
