"""PixArt-α and PixArt-Σ.

The authors fuse q, k and v of the self-attention, and k and v of the cross-attention.
"""

from ..family import Family, fuse_equal, fuse_qkv

FAMILY = Family(
    id="pixart",
    title="PixArt",
    layouts=("pixart-alpha", "pixart-sigma"),
    authors={
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
        "blocks.N.attn.qkv": fuse_qkv("transformer_blocks.N.attn1.to_{}"),
        "blocks.N.attn.proj": "transformer_blocks.N.attn1.to_out.0",
        "blocks.N.cross_attn.q_linear": "transformer_blocks.N.attn2.to_q",
        "blocks.N.cross_attn.kv_linear": fuse_equal(
            "transformer_blocks.N.attn2.to_k", "transformer_blocks.N.attn2.to_v"
        ),
        "blocks.N.cross_attn.proj": "transformer_blocks.N.attn2.to_out.0",
        "blocks.N.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
        "blocks.N.mlp.fc2": "transformer_blocks.N.ff.net.2",
        "final_layer.scale_shift_table": "scale_shift_table",
        "final_layer.linear": "proj_out",
    },
    claims={"pixart": "PixArt"},  # ai-toolkit, OneTrainer
)
