"""Lumina Image 2: three times as many queries as keys and values, fused by the authors."""

from ..family import Family, Fused

_STACKS = ("layers", "noise_refiner", "context_refiner")

FAMILY = Family(
    id="lumina2",
    title="Lumina Image 2.0",
    layouts=("lumina2",),
    authors={
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "layers.N.adaLN_modulation.1": "layers.N.norm1.linear",
        "noise_refiner.N.adaLN_modulation.1": "noise_refiner.N.norm1.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    }
    | {
        f"{stack}.N.attention.qkv": Fused(
            (f"{stack}.N.attn.to_q", f"{stack}.N.attn.to_k", f"{stack}.N.attn.to_v"), (3, 1, 1)
        )
        for stack in _STACKS
    }
    | {f"{stack}.N.attention.out": f"{stack}.N.attn.to_out.0" for stack in _STACKS}
    | {
        f"{stack}.N.feed_forward.w{number}": f"{stack}.N.feed_forward.linear_{number}"
        for stack in _STACKS
        for number in (1, 2, 3)
    },
    claims={
        "lumina2": "Lumina Image 2.0",  # sd-scripts, ai-toolkit
        "lumina-2": "Lumina Image 2.0",  # sd-scripts
    },
)
