"""Chroma (FLUX.1 schnell with one small network for all modulation) and Radiance.

Its modules have FLUX.1's names, in diffusers and in the authors' files. Radiance paints in pixels;
diffusers has no class of it, so its first and last layers have one name only.
"""

from ..family import Family
from .flux import FAMILY as FLUX

_REMOVED = ("time_in.", "guidance_in.", "vector_in.", "final_layer.adaLN_modulation.")

FAMILY = Family(
    id="chroma",
    title="Chroma",
    layouts=("chroma", "chroma-radiance"),
    authors={
        name: entry
        for name, entry in FLUX.authors.items()
        if not name.startswith(_REMOVED) and not name.endswith((".lin", "_mod.lin"))
    }
    | {
        "distilled_guidance_layer.layers.N.in_layer": "distilled_guidance_layer.layers.N.linear_1",
        "distilled_guidance_layer.layers.N.out_layer": "distilled_guidance_layer.layers.N.linear_2",
    },
    claims={
        "chroma": "Chroma",  # sd-scripts, ai-toolkit, OneTrainer
        "chroma_radiance": "Chroma Radiance",  # ai-toolkit
    },
)
