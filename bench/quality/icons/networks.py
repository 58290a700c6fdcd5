"""The coloured world's networks: a text encoder with a UNet like SDXL's or FLUX's transformer.

They see 24 × 24 pixels as 12 × 12 latents, which a fixed rearrangement makes in place of a VAE, or
as 6 × 6 patches.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .words import WIDTH, encode, new_text_encoder

UNET = {
    "sample_size": 12,
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 3],  # diffusers reads this as the number of heads
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": False,
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
    """A diffusion model of images with its text encoder, called the way a UNet is.

    A UNet sees 12 × 12 places and a transformer 6 × 6, whatever the shape of an image: what is
    larger is folded into channels.
    """

    def __init__(self, arch: str, kind: str, shape: tuple[int, int, int] = (3, 24, 24)) -> None:
        super().__init__()
        import diffusers

        flux = arch == "flux"
        build = diffusers.FluxTransformer2DModel if flux else diffusers.UNet2DConditionModel
        changes = CONFIGS.get(kind, {}).get(arch, {})
        channels, side, _ = shape
        self.arch, self.fold = arch, side // (6 if flux else 12)
        folded = {"in_channels": channels * self.fold**2}
        folded |= {} if flux else {"out_channels": channels * self.fold**2}
        self.backbone = build(**((FLUX if flux else UNET) | folded | changes))
        self.text_encoder = new_text_encoder().requires_grad_(False)

    def encode(self, y: Tensor) -> Tensor:
        """(n,) prompts -> tokens (n, 4, 64)."""
        return encode(self.text_encoder, y)

    def forward(
        self, x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Images (n, c, h, w), times (n,), (n, 4, 64) -> the prediction, as a 1-tuple."""
        if self.arch == "unet":
            folded = F.pixel_unshuffle(x, self.fold)
            out = self.backbone(folded, timestep, tokens, return_dict=False)[0]
            return (F.pixel_shuffle(out, self.fold),)
        rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
        places = torch.stack([torch.zeros(36), rows.flatten(), columns.flatten()], -1)
        out = self.backbone(
            hidden_states=F.pixel_unshuffle(x, self.fold).flatten(2).mT,
            encoder_hidden_states=tokens,
            pooled_projections=tokens.mean(1),
            timestep=timestep / 1000,
            img_ids=places,
            txt_ids=torch.zeros(tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return (F.pixel_shuffle(out.mT.unflatten(2, (6, 6)), self.fold),)


def backbone(model: nn.Module) -> nn.Module:
    """The diffusers model inside: its module names are the ones LoRAs use."""
    return model.backbone


def origin(arch: str, kind: str, name: str) -> str:
    """The source's name of a target's module or parameter."""
    for new, old in RENAMED.get((kind, arch), {}).items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def is_new(arch: str, kind: str, name: str) -> bool:
    """Whether a module or parameter belongs to a block that the source does not have."""
    return kind == "deepened" and re.match(NEW[arch], name) is not None


def is_silent(arch: str, kind: str, name: str) -> bool:
    """Whether a parameter starts with zeros, so that its new block changes nothing."""
    return is_new(arch, kind, name) and re.match(SILENT[arch], name) is not None
