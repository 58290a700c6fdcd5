"""CogVideoX 2B, 5B and 1.5, from text and from images. Programs know diffusers' names alone."""

from ..family import DIFFUSERS, PEFT, Family

FAMILY = Family(
    id="cogvideox",
    title="CogVideoX",
    layouts=(
        "cogvideox-2b",
        "cogvideox-5b",
        "cogvideox-5b-i2v",
        "cogvideox1.5-5b",
        "cogvideox1.5-5b-i2v",
    ),
    spellings={"diffusers": DIFFUSERS, "peft": PEFT},
    siblings=("CogVideoX 5B from text and from images",),
    # A convolution in 1.0, a linear layer in 1.5.
    not_linear={"patch_embed.proj": "a convolution over height and width in CogVideoX 1.0"},
)
