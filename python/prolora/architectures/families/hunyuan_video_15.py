"""HunyuanVideo 1.5: 54 double blocks and no single ones.

Its authors keep q, k and v of the blocks apart; ComfyUI's files fuse them.
"""

from ..family import Family
from .hunyuan_video import ALIASES, DOUBLE_BLOCKS, FIRST_AND_LAST, SPLIT_ALIASES, TOKEN_REFINER

FAMILY = Family(
    id="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    layouts=("hunyuan-video-1.5", "hunyuan-video-1.5-step-distilled"),
    authors={
        **FIRST_AND_LAST,
        "time_in.in_layer": "time_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_embed.timestep_embedder.linear_2",
        "time_r_in.in_layer": "time_embed.timestep_embedder_r.linear_1",
        "time_r_in.out_layer": "time_embed.timestep_embedder_r.linear_2",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
        "cond_type_embedding": "cond_type_embed",
        **TOKEN_REFINER,
        **DOUBLE_BLOCKS,
    },
    aliases={
        **{name: to for name, to in ALIASES.items() if not name.startswith("single_blocks.")},
        **SPLIT_ALIASES,
        "time_r_in.mlp.0": "time_r_in.in_layer",
        "time_r_in.mlp.2": "time_r_in.out_layer",
    },
    claims={
        # musubi-tuner writes both.
        "hunyuan_video_1_5": "HunyuanVideo 1.5",
        "hunyuan-video-1.5": "HunyuanVideo 1.5",
    },
)
