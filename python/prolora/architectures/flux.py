"""FLUX's modules as its authors, XLabs and OneTrainer name them -> diffusers' modules.

LoRA files spell all of these. The original checkpoint keeps q, k and v of a block in one matrix,
and in single blocks the first feed-forward layer too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from .authors import REST, AuthorsNames

_FLUX_MODULES: dict[str, str | tuple[str, ...]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.N.img_mod.lin": "transformer_blocks.N.norm1.linear",
    "double_blocks.N.txt_mod.lin": "transformer_blocks.N.norm1_context.linear",
    "double_blocks.N.img_attn.qkv": (
        "transformer_blocks.N.attn.to_q",
        "transformer_blocks.N.attn.to_k",
        "transformer_blocks.N.attn.to_v",
    ),
    "double_blocks.N.txt_attn.qkv": (
        "transformer_blocks.N.attn.add_q_proj",
        "transformer_blocks.N.attn.add_k_proj",
        "transformer_blocks.N.attn.add_v_proj",
    ),
    "double_blocks.N.img_attn.proj": "transformer_blocks.N.attn.to_out.0",
    "double_blocks.N.txt_attn.proj": "transformer_blocks.N.attn.to_add_out",
    "double_blocks.N.img_mlp.0": "transformer_blocks.N.ff.net.0.proj",
    "double_blocks.N.img_mlp.2": "transformer_blocks.N.ff.net.2",
    "double_blocks.N.txt_mlp.0": "transformer_blocks.N.ff_context.net.0.proj",
    "double_blocks.N.txt_mlp.2": "transformer_blocks.N.ff_context.net.2",
    "single_blocks.N.modulation.lin": "single_transformer_blocks.N.norm.linear",
    "single_blocks.N.linear1": (
        "single_transformer_blocks.N.attn.to_q",
        "single_transformer_blocks.N.attn.to_k",
        "single_transformer_blocks.N.attn.to_v",
        "single_transformer_blocks.N.proj_mlp" + REST,
    ),
    "single_blocks.N.linear2": "single_transformer_blocks.N.proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
FLUX = AuthorsNames(
    "FLUX",
    ("double_blocks.", "single_blocks."),
    re.compile(r"double_blocks\.|single_blocks\."),
    _FLUX_MODULES,
)

ROOTS = frozenset(name.split(".")[0] for name in FLUX.modules)
"""What module names of the original checkpoint start with."""

# XLabs' attention processors: `1` is the image stream, `2` the text stream.
_XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}
_XLABS = re.compile(r"(double|single)_blocks\.(\d{1,3})\.processor\.((?:qkv|proj)_lora[12]?)")
_IN_BLOCK = re.compile(r"(?:double|single)_blocks\.\d{1,3}\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.(\d{1,3})\.(.+)")


@dataclass(frozen=True)
class FluxWeight:
    """A weight of the original checkpoint.

    Attributes:
        name: its own name, `double_blocks.0.img_attn.qkv`.
        parts: the canonical modules its rows are, from the top.
        swapped: the file has the halves of its rows in the other order than diffusers.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    @property
    def shares(self) -> tuple[int, ...]:
        """Rows of each part, in units: the feed-forward layer is four times as high as q."""
        return tuple(4 if part.endswith(".proj_mlp") else 1 for part in self.parts)


def find_flux_weight(name: str) -> FluxWeight | None:
    """The original weight of that name, None if there is none.

    XLabs' processors are names too, and so are the parts that OneTrainer counts from 0
    (`img_attn.qkv.2`, `linear1.3`).

    Args:
        name: no `diffusion_model.`, no `.weight`.
    """
    if name == "img_in.proj":  # OneTrainer's name of it
        name = "img_in"
    if match := _XLABS.fullmatch(name):
        return _find_xlabs_weight(match[1], match[2], match[3])
    in_block = FLUX.is_in_block(name)
    if in_block and not _IN_BLOCK.fullmatch(name):
        return None
    parts = FLUX.find_parts(name)
    if parts is None and in_block:
        name_without_index, _, index = name.rpartition(".")
        fused = FLUX.find_parts(name_without_index) or ()
        if index not in ("0", "1", "2", "3") or len(fused) <= max(1, int(index)):
            return None
        parts = (fused[int(index)],)
    if parts is None:
        return None
    parts = tuple(part.removesuffix(REST) for part in parts)
    return FluxWeight(name, parts, swapped=parts == ("norm_out.linear",))


def _find_xlabs_weight(kind: str, block: str, processor: str) -> FluxWeight | None:
    if kind == "double":
        name = _XLABS_DOUBLE.get(processor)
        return find_flux_weight(f"double_blocks.{block}.{name}") if name else None
    if processor == "proj_lora":
        return find_flux_weight(f"single_blocks.{block}.linear2")
    if processor != "qkv_lora":
        return None
    # No feed-forward rows here, unlike in `linear1`.
    linear1 = find_flux_weight(f"single_blocks.{block}.linear1")
    return linear1 and FluxWeight(f"single_blocks.{block}.qkv", linear1.parts[:3])


def find_weight_holding(module: str) -> FluxWeight | None:
    """The original weight that a canonical module is, or is rows of."""
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        name = _authors_modules().get(module)
    else:
        start = "single_transformer_blocks" if module[0] == "s" else "transformer_blocks"
        name = _authors_modules().get(f"{start}.N.{match[2]}")
    if name is None:
        return None
    return find_flux_weight(name.replace(".N.", f".{match[1]}.") if match else name)


@cache
def _authors_modules() -> dict[str, str]:
    """Diffusers' module -> the authors' module that it is rows of, N any number."""
    return {
        part.removesuffix(REST): name
        for name, parts in FLUX.modules.items()
        for part in ((parts,) if isinstance(parts, str) else parts)
    }
