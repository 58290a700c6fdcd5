"""HunyuanImage 2.1, its distillation and its refiner.

The authors keep q, k, v and the feed-forward's first layer apart; ComfyUI's files fuse them.
"""

from ..family import Family
from .hunyuan_video import (
    ALIASES,
    DOUBLE_BLOCKS,
    FIRST_AND_LAST,
    SINGLE_BLOCKS,
    SPLIT_ALIASES,
    TOKEN_REFINER,
)

FAMILY = Family(
    id="hunyuan-image",
    title="HunyuanImage 2.1",
    layouts=("hunyuan-image", "hunyuan-image-distilled", "hunyuan-image-refiner"),
    authors={
        **FIRST_AND_LAST,
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "time_r_in.in_layer": "time_guidance_embed.timestep_embedder_r.linear_1",
        "time_r_in.out_layer": "time_guidance_embed.timestep_embedder_r.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        **TOKEN_REFINER,
        **DOUBLE_BLOCKS,
        **SINGLE_BLOCKS,
    },
    aliases={
        **ALIASES,
        **SPLIT_ALIASES,
        "single_blocks.N.linear1_q": "single_blocks.N.linear1.0",
        "single_blocks.N.linear1_k": "single_blocks.N.linear1.1",
        "single_blocks.N.linear1_v": "single_blocks.N.linear1.2",
        "single_blocks.N.linear1_mlp": "single_blocks.N.linear1.3",
        "single_blocks.N.linear2.fc": "single_blocks.N.linear2",
        "time_r_in.mlp.0": "time_r_in.in_layer",
        "time_r_in.mlp.2": "time_r_in.out_layer",
        "guidance_in.mlp.0": "guidance_in.in_layer",
        "guidance_in.mlp.2": "guidance_in.out_layer",
    },
    # sd-scripts' model; the others are the authors'.
    written_aliases=tuple(ALIASES),
    claims={"hunyuan-image": "HunyuanImage 2.1"},  # sd-scripts
)
