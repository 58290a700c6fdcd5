"""Transformers in their authors' spelling (FLUX, SD3, PixArt): fused layers as rows of one matrix.

The authors stack the projections that read the same features (q, k, v, and in FLUX's single blocks
the feed-forward too) into one matrix; diffusers keeps them apart. Every module here is a view of
the rows that are its own, so a base gives the same weights, bit by bit, in either spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ShapeMismatch
from .weights import ConvertedWeight, RowsWeight, Weight

# Authors' module -> diffusers' module, N any number. Several modules are rows of a fused matrix, in
# this order; each has as many rows as the matrix has columns, and a last one marked "…" the rest.
_FLUX: dict[str, str | tuple[str, ...]] = {
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
        "single_transformer_blocks.N.proj_mlp…",
    ),
    "single_blocks.N.linear2": "single_transformer_blocks.N.proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_SD3: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.N.x_block.adaLN_modulation.1": "transformer_blocks.N.norm1.linear",
    "joint_blocks.N.context_block.adaLN_modulation.1": "transformer_blocks.N.norm1_context.linear",
    "joint_blocks.N.x_block.attn.qkv": (
        "transformer_blocks.N.attn.to_q",
        "transformer_blocks.N.attn.to_k",
        "transformer_blocks.N.attn.to_v",
    ),
    "joint_blocks.N.x_block.attn2.qkv": (
        "transformer_blocks.N.attn2.to_q",
        "transformer_blocks.N.attn2.to_k",
        "transformer_blocks.N.attn2.to_v",
    ),
    "joint_blocks.N.context_block.attn.qkv": (
        "transformer_blocks.N.attn.add_q_proj",
        "transformer_blocks.N.attn.add_k_proj",
        "transformer_blocks.N.attn.add_v_proj",
    ),
    "joint_blocks.N.x_block.attn.proj": "transformer_blocks.N.attn.to_out.0",
    "joint_blocks.N.x_block.attn2.proj": "transformer_blocks.N.attn2.to_out.0",
    "joint_blocks.N.context_block.attn.proj": "transformer_blocks.N.attn.to_add_out",
    "joint_blocks.N.x_block.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
    "joint_blocks.N.x_block.mlp.fc2": "transformer_blocks.N.ff.net.2",
    "joint_blocks.N.context_block.mlp.fc1": "transformer_blocks.N.ff_context.net.0.proj",
    "joint_blocks.N.context_block.mlp.fc2": "transformer_blocks.N.ff_context.net.2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_PIXART: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "blocks.N.scale_shift_table": "transformer_blocks.N.scale_shift_table",
    "blocks.N.attn.qkv": (
        "transformer_blocks.N.attn1.to_q",
        "transformer_blocks.N.attn1.to_k",
        "transformer_blocks.N.attn1.to_v",
    ),
    "blocks.N.attn.proj": "transformer_blocks.N.attn1.to_out.0",
    "blocks.N.cross_attn.q_linear": "transformer_blocks.N.attn2.to_q",
    "blocks.N.cross_attn.kv_linear": (
        "transformer_blocks.N.attn2.to_k",
        "transformer_blocks.N.attn2.to_v",
    ),
    "blocks.N.cross_attn.proj": "transformer_blocks.N.attn2.to_out.0",
    "blocks.N.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
    "blocks.N.mlp.fc2": "transformer_blocks.N.ff.net.2",
    "final_layer.scale_shift_table": "scale_shift_table",
    "final_layer.linear": "proj_out",
}
_NUMBER = re.compile(r"\.(\d{1,3})\.")


@dataclass(frozen=True)
class Spelling:
    """How the authors of one family of transformers call their modules."""

    title: str
    blocks: tuple[str, ...]
    modules: Mapping[str, str | tuple[str, ...]]

    def views(self, path: str, weight: Weight, where: str) -> dict[str, Weight] | None:
        """Diffusers' modules that the authors' module holds, None if it is not known.

        Args:
            path: the authors' name, without prefix and `.weight`.
            weight: [m, n] of the whole module.
            where: what messages call the checkpoint.

        Raises:
            ShapeMismatch: a fused matrix that cannot be cut as its name says.
        """
        number = _NUMBER.search(path)
        names = self.modules.get(_NUMBER.sub(".N.", path, count=1))
        if names is None:
            names = self.modules.get(path)
        if names is None:
            return None
        fill = f".{number[1]}." if number else ".N."
        if isinstance(names, str):
            module = names.replace(".N.", fill)
            swapped = _is_shift_and_scale(module, weight.shape)
            return {module: ConvertedWeight(weight) if swapped else weight}
        return _split_rows([name.replace(".N.", fill) for name in names], path, weight, where)

    def in_block(self, path: str) -> bool:
        """Whether it lies in one of the transformer's blocks, which are known completely."""
        return path.startswith(self.blocks)


_SPELLINGS = (
    Spelling("FLUX", ("double_blocks.", "single_blocks."), _FLUX),
    Spelling("SD3", ("joint_blocks.",), _SD3),
    Spelling("PixArt", ("blocks.",), _PIXART),
)
_SIGNS = {
    "FLUX": re.compile(r"double_blocks\.|single_blocks\."),
    "SD3": re.compile(r"joint_blocks\.\d+\.(?:x|context)_block\."),
    "PixArt": re.compile(r"blocks\.\d+\.cross_attn\.(?:q|kv)_linear\."),
}


def find_spelling(keys: Iterable[str]) -> Spelling | None:
    """The authors' spelling that keys without prefix are in, if they are in one."""
    for key in keys:
        for spelling in _SPELLINGS:
            if _SIGNS[spelling.title].match(key):
                return spelling
    return None


def _split_rows(names: list[str], path: str, weight: Weight, where: str) -> dict[str, Weight]:
    """The modules of a fused matrix [m, n]: n rows each, the last the rest where marked "…"."""
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    open_end = names[-1].endswith("…")
    edges = [columns * i for i in range(len(names) + 1)]
    if open_end:
        edges[-1] = rows
    if edges[-1] != rows or edges[-1] <= edges[-2]:
        raise ShapeMismatch(
            f"{where}: {path} is {list(weight.shape)}, which does not hold {len(names)} layers of "
            f"{columns} inputs one below the other; the checkpoint is of another architecture"
        )
    return {
        name.removesuffix("…"): RowsWeight(weight, start, stop)
        for name, (start, stop) in zip(names, pairwise(edges), strict=True)
    }


def _is_shift_and_scale(module: str, shape: tuple[int, ...]) -> bool:
    """Whether the authors keep (shift, scale) where diffusers keeps (scale, shift).

    So it is wherever a layer makes just these two: after the last block, and in SD3 for the text
    stream of the last block, whose output is not used.
    """
    if module.endswith((".norm1_context.linear", "norm_out.linear")):
        return len(shape) == 2 and shape[0] == 2 * shape[1]
    return False
