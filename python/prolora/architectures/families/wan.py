"""Wan 2.1 and 2.2: text or images to video. Wan 2.2 A14B has two experts of one shape.

The authors' names are those of ComfyUI. Their `norm3` is `norm2` in diffusers, and the reverse.
"""

from ..family import Family

FAMILY = Family(
    id="wan",
    title="Wan",
    layouts=(
        "wan-t2v-14b",
        "wan2.2-i2v-14b",
        "wan2.1-i2v-14b",
        "wan2.1-flf2v-14b",
        "wan-t2v-1.3b",
        "wan2.2-ti2v-5b",
    ),
    authors={
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "blocks.N.self_attn.q": "blocks.N.attn1.to_q",
        "blocks.N.self_attn.k": "blocks.N.attn1.to_k",
        "blocks.N.self_attn.v": "blocks.N.attn1.to_v",
        "blocks.N.self_attn.o": "blocks.N.attn1.to_out.0",
        "blocks.N.cross_attn.q": "blocks.N.attn2.to_q",
        "blocks.N.cross_attn.k": "blocks.N.attn2.to_k",
        "blocks.N.cross_attn.v": "blocks.N.attn2.to_v",
        "blocks.N.cross_attn.o": "blocks.N.attn2.to_out.0",
        "blocks.N.cross_attn.k_img": "blocks.N.attn2.add_k_proj",
        "blocks.N.cross_attn.v_img": "blocks.N.attn2.add_v_proj",
        "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
        "blocks.N.ffn.2": "blocks.N.ffn.net.2",
        "blocks.N.modulation": "blocks.N.scale_shift_table",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    },
    readers={
        "ComfyUI": ("comfy", "kohya"),
        "diffusers": ("diffusers", "comfy", "kohya"),
        "InvokeAI": ("diffusers", "comfy", "kohya"),
        "musubi": ("kohya",),
    },
    claims={
        # musubi-tuner writes "wan" and "wan2.1", ai-toolkit "wan_2.1", "wan_2.2_14b", "wan_2.2_5b".
        "wan_2.2_14b": "Wan 2.2 A14B",
        "wan_2.2_5b": "Wan 2.2 TI2V 5B",
        "wan": "Wan",
    },
    siblings=(
        "Wan 2.1 14B and Wan 2.2 A14B, text to video and image to video, in all directions",
        "Wan 2.1 image to video at 480p and 720p",
        "Wan and its distillations to a few steps",
    ),
    not_linear={
        "patch_embedding": "a convolution over frames, height and width",
        "scale_shift_table": "a parameter",
        "blocks.N.scale_shift_table": "a parameter",
        "condition_embedder.image_embedder.pos_embed": "a parameter",
    },
)
