"""Cosmos-Predict2, and Anima: Cosmos's transformer with an adapter for its text encoder.

The authors' files, and ComfyUI's of Anima, have `net.` before every name. diffusers makes Anima's
`llm_adapter` a model of its own, `text_conditioner`, whose modules have the same names.
"""

from ..family import Family

_GROUPS = {
    "Anima": ("anima", "anima-2.9b", "anima-3.8b"),
    "Cosmos-Predict2": (
        "cosmos-predict2-2b",
        "cosmos-predict2-14b",
        "cosmos-predict2-2b-video",
        "cosmos-predict2-14b-video",
    ),
    "Cosmos-Predict2.5": ("cosmos-predict2.5-2b", "cosmos-predict2.5-14b"),
}

FAMILY = Family(
    id="cosmos",
    title="Anima and Cosmos-Predict2",
    layouts=tuple(size for sizes in _GROUPS.values() for size in sizes),
    groups=_GROUPS,
    authors={
        "x_embedder.proj.1": "patch_embed.proj",
        "crossattn_proj.0": "crossattn_proj.0",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "blocks.N.self_attn.q_proj": "transformer_blocks.N.attn1.to_q",
        "blocks.N.self_attn.k_proj": "transformer_blocks.N.attn1.to_k",
        "blocks.N.self_attn.v_proj": "transformer_blocks.N.attn1.to_v",
        "blocks.N.self_attn.output_proj": "transformer_blocks.N.attn1.to_out.0",
        "blocks.N.cross_attn.q_proj": "transformer_blocks.N.attn2.to_q",
        "blocks.N.cross_attn.k_proj": "transformer_blocks.N.attn2.to_k",
        "blocks.N.cross_attn.v_proj": "transformer_blocks.N.attn2.to_v",
        "blocks.N.cross_attn.output_proj": "transformer_blocks.N.attn2.to_out.0",
        "blocks.N.mlp.layer1": "transformer_blocks.N.ff.net.0.proj",
        "blocks.N.mlp.layer2": "transformer_blocks.N.ff.net.2",
        "blocks.N.adaln_modulation_self_attn.1": "transformer_blocks.N.norm1.linear_1",
        "blocks.N.adaln_modulation_self_attn.2": "transformer_blocks.N.norm1.linear_2",
        "blocks.N.adaln_modulation_cross_attn.1": "transformer_blocks.N.norm2.linear_1",
        "blocks.N.adaln_modulation_cross_attn.2": "transformer_blocks.N.norm2.linear_2",
        "blocks.N.adaln_modulation_mlp.1": "transformer_blocks.N.norm3.linear_1",
        "blocks.N.adaln_modulation_mlp.2": "transformer_blocks.N.norm3.linear_2",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    },
    claims={
        # sd-scripts writes "anima", "anima-preview" and "anima-unknown"; ai-toolkit "anima".
        "anima": "Anima",
        "cosmos": "Cosmos-Predict2",
    },
)
