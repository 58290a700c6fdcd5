"""MiniMax-H3: video and sound in one stream; two models of one shape, one reads references.

The feed-forward's first layer makes (gate, value) in the authors' files and (value, gate) in
diffusers. The rows of q, k and v are stacked in single files and in what trainers write, but
interleaved by heads in the authors' own shards, which this does not describe.
"""

from ..family import Family, Swapped, fuse_qkv

_BLOCKS = {
    "blocks.N": "transformer_blocks.N",
    "token_refiner.blocks.N": "token_refiner.refiner_blocks.N",
}

FAMILY = Family(
    id="minimax-h3",
    title="MiniMax-H3",
    layouts=("minimax-h3",),
    authors={
        "video_patch_proj": "proj_in",
        "audio_patch_proj": "audio_proj_in",
        "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1",
        "time_embedder.proj_out": "time_embedder.linear_2",
        **{
            f"{ours}.attn.qkv_proj": fuse_qkv(f"{theirs}.attn.to_{{}}")
            for ours, theirs in _BLOCKS.items()
        },
        **{f"{ours}.attn.out_proj": f"{theirs}.attn.to_out.0" for ours, theirs in _BLOCKS.items()},
        **{
            f"{ours}.mlp.fc1": Swapped(f"{theirs}.ff.net.0.proj")
            for ours, theirs in _BLOCKS.items()
        },
        **{f"{ours}.mlp.fc2": f"{theirs}.ff.net.2" for ours, theirs in _BLOCKS.items()},
        "blocks.N.adaln_proj.linear": "transformer_blocks.N.adaln_proj.linear",
        "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out",
        "final_layer.audio_out": "audio_proj_out",
    },
    claims={"minimax_h3": "MiniMax-H3"},  # ai-toolkit
)
