"""BK-SDM: students of Stable Diffusion 1.5 with fewer layers and blocks."""

from ..family import PEFT, UNET, UNET_KOHYA, Family

FAMILY = Family(
    id="bk-sdm",
    title="BK-SDM",
    layouts=("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
    # No program reads it under LDM's numbers, which count two layers a block.
    spellings={"kohya": UNET_KOHYA, "diffusers": UNET, "peft": PEFT},
    unet=True,
    rarer_than="sd15",
)
