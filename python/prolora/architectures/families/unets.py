"""UNets: Stable Diffusion 1.x, 2.x and XL, and students of these with fewer layers and blocks."""

from ..family import PEFT, SPELLINGS, UNET, UNET_KOHYA, Family

_LARGE = {**SPELLINGS, "diffusers": UNET}
_DEEP = {**_LARGE, "kohya": UNET_KOHYA}
# LDM's numbers count two layers a block, so nothing reads students of one layer under these.
_ONE_LAYER = {"kohya": UNET_KOHYA, "diffusers": UNET, "peft": PEFT}

FAMILIES = (
    Family(
        "sd15",
        "Stable Diffusion 1.5",
        ("sd15",),
        spellings=_DEEP,
        claims={
            "sd_v1": "Stable Diffusion 1.x",  # sd-scripts, and below
            "stable-diffusion-v1": "Stable Diffusion 1.x",
            "sd_1.5": "Stable Diffusion 1.5",  # ai-toolkit
        },
        unet=True,
    ),
    Family(
        "sd21",
        "Stable Diffusion 2.1",
        ("sd21",),
        spellings=_DEEP,
        claims={
            "sd_v2": "Stable Diffusion 2.x",  # sd-scripts, and below
            "stable-diffusion-v2": "Stable Diffusion 2.x",
            "sd_2.1": "Stable Diffusion 2.1",  # ai-toolkit
        },
        unet=True,
    ),
    Family(
        "sdxl",  # Pony, Illustrious, NoobAI and its students of few steps, too
        "Stable Diffusion XL",
        ("sdxl",),
        spellings=_LARGE,
        claims={
            "sdxl": "Stable Diffusion XL",  # sd-scripts, ai-toolkit, OneTrainer
            "stable-diffusion-xl": "Stable Diffusion XL",
        },
        unet=True,
    ),
    Family(
        "bk-sdm",
        "BK-SDM",
        ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
        spellings=_ONE_LAYER,
        unet=True,
        rarer_than="sd15",
    ),
    Family(
        "koala",
        "KOALA",
        ("koala-1b", "koala-700m"),
        spellings=_ONE_LAYER,
        unet=True,
        rarer_than="sdxl",
    ),
    Family(
        "segmind-vega",
        "Segmind-Vega",
        ("segmind-vega",),
        spellings=_LARGE,
        claims={"vega": "Segmind-Vega"},  # ai-toolkit
        unet=True,
        rarer_than="sdxl",
    ),
    Family(
        "ssd-1b",
        "SSD-1B",
        ("ssd-1b",),
        spellings=_LARGE,
        claims={"ssd": "SSD-1B"},  # ai-toolkit
        unet=True,
        rarer_than="sdxl",
    ),
)
