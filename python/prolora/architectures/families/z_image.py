"""Z-Image: base, Turbo, and what was trained from them.

diffusers has the authors' names. ComfyUI's checkpoints, which people download, fuse q, k and v as
Lumina 2's do. For LoRAs, ComfyUI also reads diffusers' names behind `diffusion_model.`, and
InvokeAI and diffusers read nothing else there.
"""

from ..family import SPELLINGS, Family, Spelling, fuse_qkv

FAMILY = Family(
    id="z-image",
    title="Z-Image",
    layouts=("z-image",),
    authors={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }
    | {
        f"{stack}.N.attention.qkv": fuse_qkv(f"{stack}.N.attention.to_{{}}")
        for stack in ("layers", "noise_refiner", "context_refiner")
    }
    | {
        f"{stack}.N.attention.out": f"{stack}.N.attention.to_out.0"
        for stack in ("layers", "noise_refiner", "context_refiner")
    },
    spellings={**SPELLINGS, "comfy": Spelling("diffusion_model.", "diffusers")},
    claims={
        "zimage": "Z-Image",  # ai-toolkit
        "z_image": "Z-Image",  # musubi-tuner, and below
        "z-image": "Z-Image",  # and OneTrainer
    },
)
