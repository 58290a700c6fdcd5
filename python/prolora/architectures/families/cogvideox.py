"""CogVideoX 2B, 5B and 1.5, from text and from images.

Only ComfyUI has names of its own for the modules; trainers and all others have diffusers'.
"""

from ..family import Family

FAMILY = Family(
    id="cogvideox",
    title="CogVideoX",
    layouts=(
        "cogvideox-2b",
        "cogvideox-5b",
        "cogvideox-5b-i2v",
        "cogvideox1.5-5b",
        "cogvideox1.5-5b-i2v",
    ),
    authors={
        "time_embedding_linear_1": "time_embedding.linear_1",
        "time_embedding_linear_2": "time_embedding.linear_2",
        "ofs_embedding_linear_1": "ofs_embedding.linear_1",
        "ofs_embedding_linear_2": "ofs_embedding.linear_2",
        "blocks.N.q": "transformer_blocks.N.attn1.to_q",
        "blocks.N.k": "transformer_blocks.N.attn1.to_k",
        "blocks.N.v": "transformer_blocks.N.attn1.to_v",
        "blocks.N.attn_out": "transformer_blocks.N.attn1.to_out.0",
        "blocks.N.ff_proj": "transformer_blocks.N.ff.net.0.proj",
        "blocks.N.ff_out": "transformer_blocks.N.ff.net.2",
        "blocks.N.norm1.linear": "transformer_blocks.N.norm1.linear",
        "blocks.N.norm2.linear": "transformer_blocks.N.norm2.linear",
    },
    # A convolution in 1.0, a linear layer in 1.5.
)
