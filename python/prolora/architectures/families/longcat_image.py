"""LongCat-Image and its Edit: blocks of FLUX.1, half as many, without a vector of the text.

Only the embedding of the time step has another name in diffusers.
"""

from ..family import Family
from .flux import FAMILY as FLUX

_REMOVED = ("time_in.", "guidance_in.", "vector_in.")

FAMILY = Family(
    id="longcat-image",
    title="LongCat-Image",
    layouts=("longcat-image",),
    authors={name: entry for name, entry in FLUX.authors.items() if not name.startswith(_REMOVED)}
    | {
        "time_in.in_layer": "time_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_embed.timestep_embedder.linear_2",
    },
    claims={"longcat": "LongCat-Image"},
)
