"""Small models of diffusers' own classes, with several blocks, and a call of each."""

from __future__ import annotations

import tiny_pipelines as tiny
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel
from torch import nn

from prolora.fitting.sides import Call

UNET = tiny.UNET | {
    "in_channels": 1,
    "out_channels": 1,
    "cross_attention_dim": 8,
    "use_linear_projection": True,
}


def _make_unet() -> tuple[nn.Module, Call]:
    model = UNet2DConditionModel(**UNET, transformer_layers_per_block=[1, 2])
    times = torch.tensor([500.0, 20.3])
    return model, Call((torch.randn(2, 1, 8, 8), times, torch.randn(2, 3, 8)), {})


def _make_flux() -> tuple[nn.Module, Call]:
    model = FluxTransformer2DModel(**tiny.FLUX, in_channels=16, num_layers=3, num_single_layers=4)
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "timestep": torch.tensor([0.503, 0.2]),
        "guidance": torch.full((2,), 3.5),
        "pooled_projections": torch.randn(2, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "img_ids": torch.cat([torch.zeros(16, 1), torch.randint(4, (16, 2)).float()], 1),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, Call((), inputs)


def _make_qwen() -> tuple[nn.Module, Call]:
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([0.503]),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.int64),
        "img_shapes": [[(1, 4, 4)]],
    }
    return model, Call((), inputs)


MAKERS = {"unet": _make_unet, "flux": _make_flux, "qwen": _make_qwen}


def make_model(kind: str) -> tuple[nn.Module, Call]:
    """A frozen model and a call of it; "unet", "flux" or "qwen"."""
    torch.manual_seed(0)
    model, call = MAKERS[kind]()
    return model.requires_grad_(False).eval(), call
