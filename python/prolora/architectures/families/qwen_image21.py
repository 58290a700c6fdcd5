"""Qwen-Image 2.1: one stream, one modulation for all blocks.

ComfyUI fuses the two first layers of the feed-forward; all else is called as in diffusers.
"""

from ..family import Family, fuse_equal

FAMILY = Family(
    id="qwen-image-2.1",
    title="Qwen-Image 2.1",
    layouts=("qwen-image-2.1",),
    authors={
        "transformer_blocks.N.img_mlp.gate_up": fuse_equal(
            "transformer_blocks.N.img_mlp.gate_layer", "transformer_blocks.N.img_mlp.proj"
        ),
    },
)
