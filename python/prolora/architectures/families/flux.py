"""FLUX.1: dev, schnell, Krea, Kontext, Fill.

The authors fuse q, k and v and, in single blocks, the feed-forward's first layer with them.
"""

from ..family import Family, Fused, Swapped, fuse_qkv

FAMILY = Family(
    id="flux",
    title="FLUX.1",
    layouts=("flux1-dev", "flux1-schnell", "flux1-fill"),
    authors={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "double_blocks.N.img_mod.lin": "transformer_blocks.N.norm1.linear",
        "double_blocks.N.txt_mod.lin": "transformer_blocks.N.norm1_context.linear",
        "double_blocks.N.img_attn.qkv": fuse_qkv("transformer_blocks.N.attn.to_{}"),
        "double_blocks.N.txt_attn.qkv": fuse_qkv("transformer_blocks.N.attn.add_{}_proj"),
        "double_blocks.N.img_attn.proj": "transformer_blocks.N.attn.to_out.0",
        "double_blocks.N.txt_attn.proj": "transformer_blocks.N.attn.to_add_out",
        "double_blocks.N.img_mlp.0": "transformer_blocks.N.ff.net.0.proj",
        "double_blocks.N.img_mlp.2": "transformer_blocks.N.ff.net.2",
        "double_blocks.N.txt_mlp.0": "transformer_blocks.N.ff_context.net.0.proj",
        "double_blocks.N.txt_mlp.2": "transformer_blocks.N.ff_context.net.2",
        "single_blocks.N.modulation.lin": "single_transformer_blocks.N.norm.linear",
        "single_blocks.N.linear1": Fused(
            (
                "single_transformer_blocks.N.attn.to_q",
                "single_transformer_blocks.N.attn.to_k",
                "single_transformer_blocks.N.attn.to_v",
                "single_transformer_blocks.N.proj_mlp",
            ),
            (1, 1, 1, 4),
        ),
        "single_blocks.N.linear2": "single_transformer_blocks.N.proj_out",
        "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
        "final_layer.linear": "proj_out",
    },
    aliases={
        "img_in.proj": "img_in",  # OneTrainer's
        # musubi-tuner's convert_lora.py leaves some underscores in LoRAs for FLUX.1 Kontext.
        **{
            f"double_blocks.N.{stream}_attn_{part}": f"double_blocks.N.{stream}_attn.{part}"
            for stream in ("img", "txt")
            for part in ("qkv", "proj")
        },
        # DiffSynth-Studio's: a is the image stream, b the text stream.
        "blocks.N.attn.a_to_qkv": "double_blocks.N.img_attn.qkv",
        "blocks.N.attn.b_to_qkv": "double_blocks.N.txt_attn.qkv",
        "blocks.N.attn.a_to_out": "double_blocks.N.img_attn.proj",
        "blocks.N.attn.b_to_out": "double_blocks.N.txt_attn.proj",
        "blocks.N.ff_a.0": "double_blocks.N.img_mlp.0",
        "blocks.N.ff_a.2": "double_blocks.N.img_mlp.2",
        "blocks.N.ff_b.0": "double_blocks.N.txt_mlp.0",
        "blocks.N.ff_b.2": "double_blocks.N.txt_mlp.2",
        "blocks.N.norm1_a.linear": "double_blocks.N.img_mod.lin",
        "blocks.N.norm1_b.linear": "double_blocks.N.txt_mod.lin",
        "single_blocks.N.to_qkv_mlp": "single_blocks.N.linear1",
        "single_blocks.N.proj_out": "single_blocks.N.linear2",
        "single_blocks.N.norm.linear": "single_blocks.N.modulation.lin",
        "final_proj_out": "final_layer.linear",
        # XLabs' attention processors: 1 is the image stream, 2 the text stream.
        "double_blocks.N.processor.qkv_lora1": "double_blocks.N.img_attn.qkv",
        "double_blocks.N.processor.qkv_lora2": "double_blocks.N.txt_attn.qkv",
        "double_blocks.N.processor.proj_lora1": "double_blocks.N.img_attn.proj",
        "double_blocks.N.processor.proj_lora2": "double_blocks.N.txt_attn.proj",
        "single_blocks.N.processor.proj_lora": "single_blocks.N.linear2",
        "single_blocks.N.processor.qkv_lora": fuse_qkv("single_transformer_blocks.N.attn.to_{}"),
    },
    claims={
        "flux1": "FLUX.1",  # sd-scripts, and below
        "flux-1": "FLUX.1",
        "flux.1": "FLUX.1",  # ai-toolkit, musubi-tuner
        "flux_kontext": "FLUX.1 Kontext",  # musubi-tuner
    },
)
