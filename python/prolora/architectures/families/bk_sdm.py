"""BK-SDM: students of Stable Diffusion 1.5 with fewer layers and blocks."""

from ..family import SPELLINGS, Family, Spelling

FAMILY = Family(
    id="bk-sdm",
    title="BK-SDM",
    layouts=("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
    spellings={
        **SPELLINGS,
        "kohya": Spelling("lora_unet_", "diffusers", dotted=False),
        "diffusers": Spelling("unet.", "diffusers"),
    },
    unet=True,
)
