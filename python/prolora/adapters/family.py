"""Which base models an adapter or checkpoint is of, guessed from module names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..architectures import flux
from ..architectures.modules import find_component

_DEPTH = re.compile(r"\.transformer_blocks\.(\d+)\.")
_CONTEXT = ("attn2.to_k", "attn2.to_v")
SDXL_FAMILY = ("sdxl", "ssd-1b", "segmind-vega")
_FLUX_WIDTH = 3072
# Blocks of the largest member. Qwen-Image, FLUX.2, HunyuanVideo and others share FLUX's names.
_FLUX_BLOCKS = {
    "transformer_blocks": 19,
    "double_blocks": 19,
    "single_transformer_blocks": 38,
    "single_blocks": 38,
}
_SD3_BLOCKS = {"transformer_blocks": 38}
_FLUX_ROOTS = flux.ROOTS | {"single_transformer_blocks"}
# How ss_base_model_version and modelspec.architecture begin.
_BY_VERSION = {
    "sdxl": "sdxl",
    "sd_v1": "sd15",
    "sd_v2": "sd21",
    "flux": "flux",
    "sd3": "sd3",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-v1": "sd15",
    "stable-diffusion-v2": "sd21",
    "stable-diffusion-3": "sd3",
}
# SHA-256 of the files most LoRAs are trained on.
_KNOWN_FILES = {
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": (
        "v1-5-pruned-emaonly.safetensors",
        "sd15",
    ),
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": (
        "sd_xl_base_1.0.safetensors",
        "sdxl",
    ),
    "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7": (
        "flux1-dev.safetensors",
        "flux",
    ),
    "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a": (
        "flux1-schnell.safetensors",
        "flux",
    ),
}


def guess_family(inputs: Mapping[str, int], metadata: Mapping[str, str]) -> str | None:
    """The id of a family: sd15, sd21, bk-sdm, sdxl, ssd-1b, segmind-vega, flux, sd3 or pixart.

    Names and widths decide; what the metadata claims counts only where they say nothing.

    Args:
        inputs: canonical module name -> size of its input, 0 if unknown; a FLUX weight may go by
            its original name too.
        metadata: header metadata of the file.
    """
    claimed = claimed_family(metadata)
    unet = [name for name in inputs if find_component(name) == "unet"]
    if not unet:
        transformer = [name for name in inputs if find_component(name) == "transformer"]
        return _transformer_family(transformer, inputs) or claimed
    widths = (inputs[name] for name in unet if name.endswith(_CONTEXT))
    context = next((width for width in widths if width), None)
    guess = _unet_family(unet, context)
    # Only the width of the text embedding tells SD1.x from SD2.x.
    return claimed if guess is None or (context is None and claimed == "sd21") else guess


def claimed_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata claims: by the base's hash, its version or its architecture."""
    known = known_base(metadata)
    if known:
        return known[1]
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(key, "").lower()
        families = (family for start, family in _BY_VERSION.items() if value.startswith(start))
        if family := next(families, None):
            return family
    return None


def known_base(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(file name, family) of the base model whose full hash the metadata gives, if it is known."""
    return _KNOWN_FILES.get(metadata.get("ss_new_sd_model_hash", "").lower())


def _is_as_deep_as(blocks: Mapping[str, int], modules: list[str]) -> bool:
    """Whether no module lies in a block beyond the last one of a family."""
    for name in modules:
        root, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if root in blocks and number.isdecimal() and int(number) >= blocks[root]:
            return False
    return True


def _unet_family(unet: list[str], context: int | None) -> str | None:
    depths = [int(depth) for name in unet for depth in _DEPTH.findall(name)]
    four_blocks = any(name.startswith(("up_blocks.3.", "down_blocks.3.")) for name in unet)
    if context == 2048 or (context is None and max(depths, default=0) > 0):
        return _sdxl_family(unet)
    if context == 1024:
        return "sd21"
    if context == 768 or (context is None and four_blocks and depths):
        return "bk-sdm" if _is_pruned_sd1(unet) else "sd15"
    return None


def _sdxl_family(unet: list[str]) -> str:
    """SDXL, or one of its two pruned students, by the depth of the lowest down block."""
    lowest = [name for name in unet if name.startswith("down_blocks.2.attentions.")]
    depth = max((int(d) for name in lowest for d in _DEPTH.findall(name)), default=None)
    if depth is None or any(name.startswith("mid_block.attentions.") for name in unet):
        return "sdxl"
    return "sdxl" if depth > 3 else "ssd-1b" if depth > 1 else "segmind-vega"


def _is_pruned_sd1(unet: list[str]) -> bool:
    """The BK-SDM students have one layer in every down block, SD1.5 has two."""
    down = [name for name in unet if name.startswith("down_blocks.")]
    attentions = {name.split(".")[3] for name in down if ".attentions." in name}
    return attentions == {"0"} and not any(n.startswith("mid_block.attentions.") for n in unet)


def _transformer_family(modules: list[str], inputs: Mapping[str, int]) -> str | None:
    is_flux = _is_as_deep_as(_FLUX_BLOCKS, modules)
    if any(name.split(".")[0] in _FLUX_ROOTS for name in modules):
        return "flux" if is_flux else None
    if any(".attn." in name or ".ff_context." in name for name in modules):
        # Double blocks have the same names in both; no SD3 is as wide as FLUX.
        if any(inputs[name] == _FLUX_WIDTH for name in modules):
            return "flux" if is_flux else None
        return "sd3" if _is_as_deep_as(_SD3_BLOCKS, modules) else None
    if any(".attn1." in name or ".attn2." in name for name in modules):
        return "pixart"
    return None
