"""BK-SDM: students of Stable Diffusion 1.5 with fewer layers and blocks."""

from ..family import SPELLINGS, UNET, UNET_KOHYA, Family

FAMILY = Family(
    id="bk-sdm",
    title="BK-SDM",
    layouts=("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
    spellings={**SPELLINGS, "kohya": UNET_KOHYA, "diffusers": UNET},
    unet=True,
    rarer_than="sd15",
)
