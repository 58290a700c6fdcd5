"""FLUX.2: dev, klein 9B and klein 4B, each klein with its base.

In single blocks diffusers keeps the authors' fused matrices as they are. The modulation is one for
all blocks.
"""

from ..family import Family, Swapped, fuse_qkv

FAMILY = Family(
    id="flux2",
    title="FLUX.2",
    layouts=("flux2-dev", "flux2-klein-9b", "flux2-klein-4b"),
    authors={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_blocks.N.img_attn.qkv": fuse_qkv("transformer_blocks.N.attn.to_{}"),
        "double_blocks.N.txt_attn.qkv": fuse_qkv("transformer_blocks.N.attn.add_{}_proj"),
        "double_blocks.N.img_attn.proj": "transformer_blocks.N.attn.to_out.0",
        "double_blocks.N.txt_attn.proj": "transformer_blocks.N.attn.to_add_out",
        "double_blocks.N.img_mlp.0": "transformer_blocks.N.ff.linear_in",
        "double_blocks.N.img_mlp.2": "transformer_blocks.N.ff.linear_out",
        "double_blocks.N.txt_mlp.0": "transformer_blocks.N.ff_context.linear_in",
        "double_blocks.N.txt_mlp.2": "transformer_blocks.N.ff_context.linear_out",
        "single_blocks.N.linear1": "single_transformer_blocks.N.attn.to_qkv_mlp_proj",
        "single_blocks.N.linear2": "single_transformer_blocks.N.attn.to_out",
        "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
        "final_layer.linear": "proj_out",
    },
    claims={
        "flux2": "FLUX.2",  # ai-toolkit
        "flux_2_": "FLUX.2",  # musubi-tuner, and below
        "flux.2": "FLUX.2",  # and OneTrainer
    },
)
