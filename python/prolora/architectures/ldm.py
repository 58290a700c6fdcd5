"""Module names of single-file UNets (LDM, SGM) <-> diffusers' names.

LDM numbers the blocks of a UNet in one row: `input_blocks.0` is conv_in, then every down block is
`layers_per_block` layers and a downsampler; every up block is `layers_per_block + 1` layers, and
the last one carries the upsampler. Inside a numbered block, `.0` is the resnet and `.1` the
attention. Names follow by arithmetic, so no table of a particular model is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from .family import Family

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Attention modules are called the same on both sides.
_ATTENTION_PARTS = frozenset({"norm", "proj_in", "proj_out", "transformer_blocks"})

_TRANSFORMER = re.compile(r"[._](?:transformer_blocks|proj_in)(?:[._]|$)")
_MOST_BLOCKS = 8
"""A UNet's levels: twice as many as any published one has."""

ADM = Family("adm", "ADM (guided diffusion, consistency models)", ())
"""How the modules of an ADM network are read: each by its own name, and none by a table."""

SGM_ROOTS = frozenset(
    {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}
)


def is_adm(names: Iterable[str]) -> bool:
    """Recognises an ADM network by all its modules in LDM's numbers: no transformers."""
    return not any(_TRANSFORMER.search(name) for name in names)


def ldm_to_diffusers(name: str, layers_per_block: int = 2) -> str | None:
    """Returns the diffusers name of an LDM module, or None for another name.

    Args:
        name: e.g. `input_blocks.4.1.proj_in`: no `model.diffusion_model.`, no `.weight`.
        layers_per_block: 2 in every Stable Diffusion but the BK-SDM students.
    """
    return _translate(name, *_pair_names(layers_per_block))


def diffusers_to_ldm(
    name: str, *, siblings: Iterable[str] = (), layers_per_block: int = 2
) -> str | None:
    """Returns the LDM name of a diffusers module, or None for another name.

    Args:
        name: e.g. `down_blocks.1.attentions.0.proj_in`: no `unet.`, no `.weight`.
        siblings: other module names of the same model. Only the first upsampler needs them: its
            number depends on whether its block has attention (SDXL) or not (SD1.x, SD2.x). With
            no sign of either, SDXL is assumed, which LDM spelling is in use for.
        layers_per_block: 2 in every Stable Diffusion but the BK-SDM students.
    """
    path = _translate(name, *_pair_names(layers_per_block, back=True))
    if name == "up_blocks.0.upsamplers.0.conv" and path and not _has_attention(siblings):
        return path.replace(".2.conv", ".1.conv")
    return path


@cache
def _pair_names(layers: int, back: bool = False) -> list[dict[str, str]]:
    """Returns LDM's names -> diffusers': of single layers, of blocks, of layers in a resnet.

    `back` gives diffusers' names -> LDM's. Where a block has no attention, the upsampler moves up
    from `.2` to `.1`.
    """
    whole, step = dict(_OUTSIDE), layers + 1
    blocks = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    for block in range(_MOST_BLOCKS):
        down, up, first = f"down_blocks.{block}", f"up_blocks.{block}", block * step
        whole[f"input_blocks.{first + step}.0.op"] = f"{down}.downsamplers.0.conv"
        whole[f"output_blocks.{first + layers}.1.conv"] = f"{up}.upsamplers.0.conv"
        whole[f"output_blocks.{first + layers}.2.conv"] = f"{up}.upsamplers.0.conv"
        for part, kind in enumerate(("resnets", "attentions")):
            for layer in range(step):
                blocks[f"output_blocks.{first + layer}.{part}"] = f"{up}.{kind}.{layer}"
            for layer in range(layers):
                blocks[f"input_blocks.{first + 1 + layer}.{part}"] = f"{down}.{kind}.{layer}"
    tables = [whole, blocks, _RESNET]
    return [{to: name for name, to in one.items()} for one in tables] if back else tables


def _translate(
    name: str, whole: dict[str, str], blocks: dict[str, str], resnet: dict[str, str]
) -> str | None:
    """Returns the other name of a layer, single or in a block."""
    if name in whole:
        return whole[name]
    words = name.split(".")
    for count in (2, 3, 4):
        start, rest = ".".join(words[:count]), words[count:]
        if start in blocks and rest:
            if "resnets" in start + blocks[start]:
                leaf = resnet.get(".".join(rest))
            else:
                leaf = ".".join(rest) if rest[0] in _ATTENTION_PARTS else None
            return leaf and f"{blocks[start]}.{leaf}"
    return None


def _has_attention(siblings: Iterable[str]) -> bool:
    """Returns whether the first up block has attention: not in a UNet of four blocks."""
    names = [*siblings]
    if any(name.startswith("up_blocks.0.attentions.") for name in names):
        return True
    return not any(name.startswith(("down_blocks.3.", "up_blocks.3.")) for name in names)
