"""Stable Diffusion 3 and 3.5: Medium, and Large with its Turbo.

The authors fuse q, k and v. The text stream of the last block gives only what the attention reads,
so its modulation makes two vectors, in the order of the last layer's.
"""

from ..family import Family, Swapped, fuse_qkv

FAMILY = Family(
    id="sd3",
    title="Stable Diffusion 3",
    layouts=("sd3-medium", "sd3.5-medium", "sd3.5-large"),
    authors={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "joint_blocks.N.x_block.adaLN_modulation.1": "transformer_blocks.N.norm1.linear",
        "joint_blocks.N.context_block.adaLN_modulation.1": Swapped(
            "transformer_blocks.N.norm1_context.linear", only_if_two=True
        ),
        "joint_blocks.N.x_block.attn.qkv": fuse_qkv("transformer_blocks.N.attn.to_{}"),
        "joint_blocks.N.x_block.attn2.qkv": fuse_qkv("transformer_blocks.N.attn2.to_{}"),
        "joint_blocks.N.context_block.attn.qkv": fuse_qkv("transformer_blocks.N.attn.add_{}_proj"),
        "joint_blocks.N.x_block.attn.proj": "transformer_blocks.N.attn.to_out.0",
        "joint_blocks.N.x_block.attn2.proj": "transformer_blocks.N.attn2.to_out.0",
        "joint_blocks.N.context_block.attn.proj": "transformer_blocks.N.attn.to_add_out",
        "joint_blocks.N.x_block.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
        "joint_blocks.N.x_block.mlp.fc2": "transformer_blocks.N.ff.net.2",
        "joint_blocks.N.context_block.mlp.fc1": "transformer_blocks.N.ff_context.net.0.proj",
        "joint_blocks.N.context_block.mlp.fc2": "transformer_blocks.N.ff_context.net.2",
        "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
        "final_layer.linear": "proj_out",
    },
    claims={
        "sd3": "Stable Diffusion 3",  # sd-scripts, and below
        "stable-diffusion-3": "Stable Diffusion 3",
        "stable-diffusion-v3": "Stable Diffusion 3",  # OneTrainer
        "sd_3": "Stable Diffusion 3",  # ai-toolkit
    },
)
