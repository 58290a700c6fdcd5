"""ACE-Step 1.5: music, in two sizes.

Checkpoints hold the transformer as `decoder.`, which the authors' own LoRAs leave out.
"""

from ..family import DIFFUSERS, Family, Spelling

_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}

FAMILY = Family(
    id="ace-step-1.5",
    title="ACE-Step 1.5",
    layouts=("ace-step-1.5", "ace-step-1.5-xl"),
    authors={
        "proj_in.1": "proj_in_conv",
        "proj_out.1": "proj_out_conv",
        **{
            f"layers.N.{where}.{name}": f"layers.N.{where}.{to}"
            for where in ("self_attn", "cross_attn")
            for name, to in _ATTENTION.items()
        },
    },
    spellings={
        "comfy": Spelling("diffusion_model.decoder.", "authors"),
        "kohya": Spelling("lora_unet_decoder_", "authors", dotted=False),
        "diffusers": DIFFUSERS,
        "peft": Spelling("base_model.model.", "authors"),
    },
)
