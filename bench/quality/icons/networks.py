"""The coloured world's networks: a text encoder with a UNet like SDXL's or FLUX's transformer.

They see 24 × 24 pixels as 12 × 12 latents, which a fixed rearrangement makes in place of a VAE, or
as 6 × 6 patches; the shipped ones 32 × 32 as 8 × 8.
"""

from __future__ import annotations

import re
from functools import partial

import digits_networks
import torch.nn.functional as F
from digits_networks import find_origin, run_transformer
from torch import Tensor, nn

from .words import WIDTH, encode, new_text_encoder

UNET = digits_networks.UNET | {
    "sample_size": 12,
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64, 96],
    "attention_head_dim": [1, 2, 3],  # diffusers reads this as the number of heads
    "cross_attention_dim": WIDTH,
}
FLUX = digits_networks.FLUX | {
    "in_channels": 48,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": [8, 12, 12],
}
# As SSD-1B was cut from SDXL and Flex from FLUX: whole blocks are left out.
CUT = {
    "unet": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 1],
        "reverse_transformer_layers_per_block": [1, 1, 1],
    },
    "flux": {"num_single_layers": 2},
}
CONFIGS = {
    "pruned": CUT,
    "renumbered": CUT,
    "resized": {
        "unet": {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2]},
        "flux": {"num_attention_heads": 2, "num_single_layers": 3},
    },
    "deepened": {
        "unet": {"transformer_layers_per_block": [1, 2, 3]},
        "flux": {"num_single_layers": 6},
    },
}
# The source's name of what a target's module came from, where the two differ.
RENAMED = {
    ("renumbered", "unet"): {
        "down_blocks.2.attentions.0.transformer_blocks.0.": (
            "down_blocks.2.attentions.0.transformer_blocks.1."
        ),
        **{
            f"up_blocks.0.attentions.{i}.transformer_blocks.0.": (
                f"up_blocks.0.attentions.{i}.transformer_blocks.1."
            )
            for i in (0, 1)
        },
    },
    ("renumbered", "flux"): {
        "single_transformer_blocks.0.": "single_transformer_blocks.1.",
        "single_transformer_blocks.1.": "single_transformer_blocks.3.",
    },
    # The third and the last transformer block are new, made of the one before.
    ("deepened", "flux"): {
        f"single_transformer_blocks.{new}.": f"single_transformer_blocks.{old}."
        for new, old in ((2, 1), (3, 2), (4, 3), (5, 3))
    },
    ("deepened", "unet"): {
        f"{place}.transformer_blocks.{new}.": f"{place}.transformer_blocks.{new - 1}."
        for new, places in (
            (1, ["down_blocks.1.attentions.0", "up_blocks.1.attentions.0"]),
            (1, ["up_blocks.1.attentions.1"]),
            (2, ["down_blocks.2.attentions.0", "mid_block.attentions.0"]),
            (2, ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]),
        )
        for place in places
    },
}
NEW = {
    "flux": r"single_transformer_blocks\.(2|5)\.",
    "unet": r"(down_blocks\.1|up_blocks\.1)\..*transformer_blocks\.1\.|.*transformer_blocks\.2\.",
}
"""Blocks that only the deepened target has."""
SILENT = {
    "flux": r"single_transformer_blocks\.\d+\.proj_out\.",
    "unet": r".*(to_out\.0|ff\.net\.2)\.",
}
"""The last layers of a block's parts: zeros there at the start, and a new block changes nothing."""


class Painter(nn.Module):
    """A diffusion model of images with its text encoder, called the way a UNet is."""

    def __init__(self, arch: str, kind: str) -> None:
        super().__init__()
        import diffusers

        flux = arch == "flux"
        build = diffusers.FluxTransformer2DModel if flux else diffusers.UNet2DConditionModel
        changes = CONFIGS.get(kind, {}).get(arch, {})
        self.arch, self.fold = arch, 4 if flux else 2
        self.backbone = build(**((FLUX if flux else UNET) | changes))
        self.text_encoder = new_text_encoder().requires_grad_(False)

    def encode(self, y: Tensor) -> Tensor:
        """(n,) prompts -> tokens (n, 4, 64)."""
        return encode(self.text_encoder, y)

    def forward(
        self, x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Images (n, c, h, w), times (n,), (n, 4, 64) -> the prediction, as a 1-tuple."""
        if self.arch == "flux":
            return (run_transformer(self.backbone, x, self.fold, timestep, tokens),)
        folded = F.pixel_unshuffle(x, self.fold)
        out = self.backbone(folded, timestep, tokens, return_dict=False)[0]
        return (F.pixel_shuffle(out, self.fold),)


origin = partial(find_origin, RENAMED)


def is_new(arch: str, kind: str, name: str) -> bool:
    """Whether a module or parameter belongs to a block that the source does not have."""
    return kind == "deepened" and re.match(NEW[arch], name) is not None


def is_silent(arch: str, kind: str, name: str) -> bool:
    """Whether a parameter starts with zeros, so that its new block changes nothing."""
    return is_new(arch, kind, name) and re.match(SILENT[arch], name) is not None
