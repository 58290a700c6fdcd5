"""Chroma: FLUX.1 schnell whose modulation comes from one small network; and Radiance, in pixels.

Its modules are called as those of FLUX.1, in diffusers and by the authors. diffusers has no class
of Radiance, whose first and last layers have one name only.
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
    siblings=("Chroma and Chroma Radiance",),
)
