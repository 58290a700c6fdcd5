"""Mochi 1: text to video.

The feed-forward's first layer makes (gate, value) in the authors' files and (value, gate) in
diffusers, the last modulation (shift, scale) and (scale, shift). `mod_y` of the last block makes
fewer rows than the others and has a name of its own in diffusers, `norm1_context.linear_1`.
"""

from ..family import Family, Swapped, fuse_qkv

FAMILY = Family(
    id="mochi",
    title="Mochi 1",
    layouts=("mochi",),
    authors={
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "t5_y_embedder.to_out": "time_embed.pooler.to_out",
        "t5_yproj": "time_embed.caption_proj",
        "blocks.N.mod_x": "transformer_blocks.N.norm1.linear",
        "blocks.N.mod_y": "transformer_blocks.N.norm1_context.linear",
        "blocks.47.mod_y": "transformer_blocks.47.norm1_context.linear_1",
        "blocks.N.attn.qkv_x": fuse_qkv("transformer_blocks.N.attn1.to_{}"),
        "blocks.N.attn.qkv_y": fuse_qkv("transformer_blocks.N.attn1.add_{}_proj"),
        "blocks.N.attn.proj_x": "transformer_blocks.N.attn1.to_out.0",
        "blocks.N.attn.proj_y": "transformer_blocks.N.attn1.to_add_out",
        "blocks.N.mlp_x.w1": Swapped("transformer_blocks.N.ff.net.0.proj"),
        "blocks.N.mlp_x.w2": "transformer_blocks.N.ff.net.2",
        "blocks.N.mlp_y.w1": Swapped("transformer_blocks.N.ff_context.net.0.proj"),
        "blocks.N.mlp_y.w2": "transformer_blocks.N.ff_context.net.2",
        "final_layer.mod": Swapped("norm_out.linear"),
        "final_layer.linear": "proj_out",
    },
)
