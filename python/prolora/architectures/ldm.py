"""Module names of single-file UNets (LDM, SGM) <-> diffusers' names.

LDM numbers the blocks of a UNet in one row: `input_blocks.0` is conv_in, then every down block is
`layers_per_block` layers and a downsampler; every up block is `layers_per_block + 1` layers, and
the last one carries the upsampler. Inside a numbered block, `.0` is the resnet and `.1` the
attention. Names follow by arithmetic, so no table of a particular model is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .family import Family

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {diffusers: ldm for ldm, diffusers in _RESNET.items()}

_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_OUTSIDE_BACK = {diffusers: ldm for ldm, diffusers in _OUTSIDE.items()}

# Attention modules are called the same on both sides.
_ATTENTION_PARTS = frozenset({"norm", "proj_in", "proj_out", "transformer_blocks"})

_TRANSFORMER = re.compile(r"[._](?:transformer_blocks|proj_in)(?:[._]|$)")
_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,3})\.([012])\.(.+)")
_LDM_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d{1,3})\."
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)")

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
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if match := _LDM_MIDDLE.fullmatch(name):
        return _middle_to_diffusers(int(match[1]), match[2])
    match = _LDM_BLOCK.fullmatch(name)
    if not match:
        return None
    side, number, part, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        return _input_to_diffusers(number, part, rest, layers_per_block)
    return _output_to_diffusers(number, part, rest, layers_per_block)


def _input_to_diffusers(number: int, part: int, rest: str, layers: int) -> str | None:
    if number == 0:
        return None
    block, layer = divmod(number - 1, layers + 1)
    if layer == layers:
        is_downsampler = part == 0 and rest == "op"
        return f"down_blocks.{block}.downsamplers.0.conv" if is_downsampler else None
    return _layer_to_diffusers(f"down_blocks.{block}", part, layer, rest)


def _output_to_diffusers(number: int, part: int, rest: str, layers: int) -> str | None:
    block, layer = divmod(number, layers + 1)
    # Where a block has no attention the upsampler moves up from `.2` to `.1`.
    if part in (1, 2) and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv" if layer == layers else None
    return _layer_to_diffusers(f"up_blocks.{block}", part, layer, rest)


def _middle_to_diffusers(part: int, rest: str) -> str | None:
    if part == 1:
        return _layer_to_diffusers("mid_block", 1, 0, rest)
    return _layer_to_diffusers("mid_block", 0, part // 2, rest)


def _layer_to_diffusers(block: str, part: int, layer: int, rest: str) -> str | None:
    """Builds the name of a resnet (`part` 0) or an attention (`part` 1)."""
    if part == 0 and rest in _RESNET:
        return f"{block}.resnets.{layer}.{_RESNET[rest]}"
    if part == 1 and rest.split(".")[0] in _ATTENTION_PARTS:
        return f"{block}.attentions.{layer}.{rest}"
    return None


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
    if name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[name]
    if match := _MIDDLE.fullmatch(name):
        part = ("resnets.0", "attentions.0", "resnets.1").index(match[1])
        leaf = _leaf_to_ldm(match[1].split(".")[0], match[2])
        return leaf and f"middle_block.{part}.{leaf}"
    match = _BLOCK.fullmatch(name)
    if not match:
        return None
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    step = layers_per_block + 1
    if kind in ("downsamplers", "upsamplers"):
        if (layer, rest, kind) != (0, "conv", "downsamplers" if side == "down" else "upsamplers"):
            return None
        if side == "down":
            return f"input_blocks.{(block + 1) * step}.0.op"
        part = 2 if _has_attention(block, siblings) else 1
        return f"output_blocks.{block * step + layers_per_block}.{part}.conv"
    leaf = _leaf_to_ldm(kind, rest)
    if leaf is None or layer >= (layers_per_block if side == "down" else step):
        return None
    part = 0 if kind == "resnets" else 1
    if side == "down":
        return f"input_blocks.{1 + block * step + layer}.{part}.{leaf}"
    return f"output_blocks.{block * step + layer}.{part}.{leaf}"


def _leaf_to_ldm(kind: str, rest: str) -> str | None:
    """Returns the part of the name inside a resnet or an attention."""
    if kind == "resnets":
        return _RESNET_BACK.get(rest)
    return rest if rest.split(".")[0] in _ATTENTION_PARTS else None


def _has_attention(block: int, siblings: Iterable[str]) -> bool:
    """Returns whether an up block has attention: all but a four-block UNet's first."""
    names = [] if block > 0 else [*siblings]
    if any(name.startswith("up_blocks.0.attentions.") for name in names):
        return True
    return not any(name.startswith(("down_blocks.3.", "up_blocks.3.")) for name in names)
