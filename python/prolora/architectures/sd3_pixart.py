"""SD3 and PixArt as their authors name them: which modules of diffusers those are."""

from __future__ import annotations

import re

from .authors import AuthorsNames

_SD3_MODULES: dict[str, str | tuple[str, ...]] = {
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
SD3 = AuthorsNames(
    "SD3",
    ("joint_blocks.",),
    re.compile(r"joint_blocks\.\d+\.(?:x|context)_block\."),
    _SD3_MODULES,
)
_PIXART_MODULES: dict[str, str | tuple[str, ...]] = {
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
PIXART = AuthorsNames(
    "PixArt",
    ("blocks.",),
    re.compile(r"blocks\.\d+\.cross_attn\.(?:q|kv)_linear\."),
    _PIXART_MODULES,
)
