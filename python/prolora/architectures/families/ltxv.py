"""LTX-Video, 2B and 13B. Blocks have the same names in the authors' files and in diffusers."""

from ..family import Family

FAMILY = Family(
    id="ltxv",
    title="LTX-Video",
    layouts=("ltxv-2b", "ltxv-13b"),
    authors={
        "patchify_proj": "proj_in",
        "adaln_single.linear": "time_embed.linear",
        "adaln_single.emb.timestep_embedder.linear_1": (
            "time_embed.emb.timestep_embedder.linear_1"
        ),
        "adaln_single.emb.timestep_embedder.linear_2": (
            "time_embed.emb.timestep_embedder.linear_2"
        ),
    },
)
