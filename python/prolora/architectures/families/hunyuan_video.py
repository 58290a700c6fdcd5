"""HunyuanVideo: text to video, image to video, FramePack. Blocks as in FLUX.1.

The names are ComfyUI's. The authors write some of them otherwise (`img_attn_qkv` for
`img_attn.qkv`); those are the aliases. HunyuanVideo 1.5 and HunyuanImage share most of both.
"""

from ..family import Family, Fused, Swapped, fuse_qkv
from .flux import FAMILY as FLUX

Authors = dict[str, str | Fused | Swapped]

_EMBEDDERS = ("time_in.", "guidance_in.", "vector_in.")

TOKEN_REFINER: Authors = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.in_layer": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.out_layer": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.in_layer": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "context_embedder.time_text_embed.text_embedder.linear_2",
    "txt_in.individual_token_refiner.blocks.N.self_attn.qkv": fuse_qkv(
        "context_embedder.token_refiner.refiner_blocks.N.attn.to_{}"
    ),
    "txt_in.individual_token_refiner.blocks.N.self_attn.proj": (
        "context_embedder.token_refiner.refiner_blocks.N.attn.to_out.0"
    ),
    "txt_in.individual_token_refiner.blocks.N.mlp.0": (
        "context_embedder.token_refiner.refiner_blocks.N.ff.net.0.proj"
    ),
    "txt_in.individual_token_refiner.blocks.N.mlp.2": (
        "context_embedder.token_refiner.refiner_blocks.N.ff.net.2"
    ),
    "txt_in.individual_token_refiner.blocks.N.adaLN_modulation.1": (
        "context_embedder.token_refiner.refiner_blocks.N.norm_out.linear"
    ),
}
DOUBLE_BLOCKS: Authors = {n: x for n, x in FLUX.authors.items() if n.startswith("double_blocks.")}
SINGLE_BLOCKS: Authors = {n: x for n, x in FLUX.authors.items() if n.startswith("single_blocks.")}
FIRST_AND_LAST: Authors = {
    "img_in.proj": "x_embedder.proj",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
    "final_layer.linear": "proj_out",
}
ALIASES: dict[str, str | Fused] = {
    "time_in.mlp.0": "time_in.in_layer",
    "time_in.mlp.2": "time_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    "txt_in.individual_token_refiner.blocks.N.self_attn_qkv": (
        "txt_in.individual_token_refiner.blocks.N.self_attn.qkv"
    ),
    "txt_in.individual_token_refiner.blocks.N.self_attn_proj": (
        "txt_in.individual_token_refiner.blocks.N.self_attn.proj"
    ),
    "txt_in.individual_token_refiner.blocks.N.mlp.fc1": (
        "txt_in.individual_token_refiner.blocks.N.mlp.0"
    ),
    "txt_in.individual_token_refiner.blocks.N.mlp.fc2": (
        "txt_in.individual_token_refiner.blocks.N.mlp.2"
    ),
    "double_blocks.N.img_mod.linear": "double_blocks.N.img_mod.lin",
    "double_blocks.N.txt_mod.linear": "double_blocks.N.txt_mod.lin",
    "double_blocks.N.img_attn_qkv": "double_blocks.N.img_attn.qkv",
    "double_blocks.N.txt_attn_qkv": "double_blocks.N.txt_attn.qkv",
    "double_blocks.N.img_attn_proj": "double_blocks.N.img_attn.proj",
    "double_blocks.N.txt_attn_proj": "double_blocks.N.txt_attn.proj",
    "double_blocks.N.img_mlp.fc1": "double_blocks.N.img_mlp.0",
    "double_blocks.N.img_mlp.fc2": "double_blocks.N.img_mlp.2",
    "double_blocks.N.txt_mlp.fc1": "double_blocks.N.txt_mlp.0",
    "double_blocks.N.txt_mlp.fc2": "double_blocks.N.txt_mlp.2",
    "single_blocks.N.modulation.linear": "single_blocks.N.modulation.lin",
}
# The authors of HunyuanVideo 1.5 and HunyuanImage keep q, k and v apart; ComfyUI fuses them.
SPLIT_ALIASES: dict[str, str | Fused] = {
    f"double_blocks.N.{stream}_attn_{part}": f"double_blocks.N.{stream}_attn.qkv.{number}"
    for stream in ("img", "txt")
    for number, part in enumerate("qkv")
}

FAMILY = Family(
    id="hunyuan-video",
    title="HunyuanVideo",
    layouts=("hunyuan-video", "hunyuan-video-i2v-33", "framepack"),
    authors={
        **FIRST_AND_LAST,
        **{n: x for n, x in FLUX.authors.items() if n.startswith(_EMBEDDERS)},
        **TOKEN_REFINER,
        **DOUBLE_BLOCKS,
        **SINGLE_BLOCKS,
    },
    aliases={
        **ALIASES,
        "guidance_in.mlp.0": "guidance_in.in_layer",
        "guidance_in.mlp.2": "guidance_in.out_layer",
    },
    claims={
        # musubi-tuner writes "hunyuan_video", "hunyuan-video" and "framepack", OneTrainer
        # "hunyuan-video".
        "hunyuan_video": "HunyuanVideo",
        "hunyuan-video": "HunyuanVideo",
        "framepack": "FramePack",
    },
)
