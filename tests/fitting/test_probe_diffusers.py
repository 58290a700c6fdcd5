"""Fits of diffusers' own modules: blocks are recognised, gates and text streams are handled."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from fitting import FlowSide, fit_models
from torch import Tensor, nn

from prolora import LowRank
from prolora import fitting as probe

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


class TextSide(FlowSide):
    """A model that is given one text."""

    def build_call(self, state: Tensor, level: Tensor, *_: Any) -> probe.Call:
        text = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
        text = text.expand(len(state), -1, -1)
        more = {"encoder_hidden_states": text}
        if isinstance(self.denoiser, FluxTransformer2DModel):
            ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
            more |= {"pooled_projections": text.mean(1), **ids}
        return probe.Call((state,), more | {"timestep": level.float()})


@pytest.mark.parametrize(
    ("make", "shape", "pattern"),
    [
        (
            lambda: FluxTransformer2DModel(**FLUX),
            (4, 4),
            r".*blocks\.\d+\.(attn\.(to_q|to_v|to_out\.0|add_v_proj)|ff\.net\.2|proj_out)",
        ),
        pytest.param(
            lambda: UNet2DConditionModel(**UNET),
            (1, 8, 8),
            r".*transformer_blocks\.0\.(attn[12]\.to_(v|out\.0)|ff\.net\.2)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_model_takes_the_change_in_all_kinds_of_blocks(make, shape, pattern):
    torch.manual_seed(0)
    model = make()
    lora = loras(model, pattern)
    sides = TextSide(model, shape), TextSide(copy.deepcopy(model), shape)
    result = fit_models(*sides, lora, images=6, fit_steps=12, rank=2)
    assert result.report.gate.share["all"] > 0.8
    assert set(lora) <= set(result.updates)
