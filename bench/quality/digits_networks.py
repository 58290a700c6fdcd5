"""The digits' networks: small UNets with SDXL's module names, small transformers with FLUX's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 24, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 2, 4],  # diffusers reads this as the number of heads
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 6, 6],
}
# As SSD-1B was cut from SDXL: no attention in the middle, fewer blocks elsewhere; and as Flex was
# cut from FLUX: complete blocks are left out.
PRUNED = {
    "unet": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 1],
        "reverse_transformer_layers_per_block": [[2, 1], 1, 1],
    },
    "flux": {"num_single_layers": 2},
}
RESIZED = {
    "unet": {
        "block_out_channels": [8, 24, 48],
        "attention_head_dim": [2, 2, 3],
        "transformer_layers_per_block": [1, 1, 1],
    },
    "flux": {"num_attention_heads": 3, "num_layers": 1, "num_single_layers": 4},
}
CONFIGS = {"pruned": PRUNED, "resized": RESIZED}
# Which blocks of the source a pruned student keeps, as {student's prefix: source's prefix}, where
# the two differ.
RENAMED = {
    ("pruned", "unet"): {
        "up_blocks.0.attentions.1.transformer_blocks.0.": (
            "up_blocks.0.attentions.1.transformer_blocks.1."
        )
    },
    ("pruned", "flux"): {"single_transformer_blocks.1.": "single_transformer_blocks.3."},
}
# What a LoRA is trained on: the linear layers of attention and feed-forward.
ADAPTED = {
    "unet": r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)",
    "flux": (
        r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj"
        r"|add_v_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    ),
}


class ImageTransformer(nn.Module):
    """FLUX's transformer on 16x16 images, called the way a UNet is."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.transformer = FluxTransformer2DModel(**config)

    @property
    def backbone(self) -> nn.Module:
        """The diffusers model inside."""
        return self.transformer

    def forward(
        self, x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """(n, 1, 16, 16), times (n,) in 0..1000, (n, 4, 64) -> the velocity, as a 1-tuple."""
        return (run_transformer(self.transformer, x, 4, timestep, tokens),)


def run_transformer(
    transformer: nn.Module, x: Tensor, fold: int, timestep: Tensor, tokens: Tensor
) -> Tensor:
    """What FLUX's transformer makes of images whose squares of `fold` pixels are its patches."""
    side = x.shape[-1] // fold
    rows, columns = torch.meshgrid(*2 * [torch.arange(float(side))], indexing="ij")
    out = transformer(
        hidden_states=F.pixel_unshuffle(x, fold).flatten(2).mT,
        encoder_hidden_states=tokens,
        pooled_projections=tokens.mean(1),
        timestep=timestep / 1000,
        img_ids=torch.stack([torch.zeros(side**2), rows.flatten(), columns.flatten()], -1),
        txt_ids=torch.zeros(tokens.shape[1], 3),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(out.mT.unflatten(2, (side, side)), fold)


def new_model(arch: str, kind: str) -> nn.Module:
    """A base model with fresh weights, drawn from torch's global generator."""
    changes = CONFIGS.get(kind, {}).get(arch, {})
    if arch == "flux":
        return ImageTransformer(FLUX | changes)
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(UNET | changes))


def find_origin(
    renamed: Mapping[tuple[str, str], Mapping[str, str]], arch: str, kind: str, name: str
) -> str:
    """The source's name of a target's module or parameter."""
    for new, old in renamed.get((kind, arch), {}).items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


origin = partial(find_origin, RENAMED)
