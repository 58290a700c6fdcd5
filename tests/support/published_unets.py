"""Configurations of the UNets whose names follow from arithmetic, as their publishers have them.

KOALA's stand with the transformers in `published_models`.
"""

from __future__ import annotations

from published_models import PUBLISHED, SDXL, Published

PRUNED = {**SDXL, "mid_block_type": "UNetMidBlock2D"}
_SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}


def publish_unet(title: str, billions: float, **config: object) -> Published:
    source = "the model's own unet/config.json"
    return Published(title, "UNet2DConditionModel", billions, source, config)


UNETS = {
    "sd15": publish_unet("SD1.5", 0.9, cross_attention_dim=768),
    "sd21": publish_unet("SD2.1", 0.9, **_SD21, use_linear_projection=True),
    "sdxl": publish_unet("SDXL", 2.6, **SDXL, transformer_layers_per_block=(1, 2, 10)),
    "ssd-1b": publish_unet(
        "SSD-1B",
        1.3,
        **PRUNED,
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    ),
    "segmind-vega": publish_unet(
        "Segmind-Vega",
        0.7,
        **PRUNED,
        transformer_layers_per_block=(1, (1, 1), (2, 2)),
        reverse_transformer_layers_per_block=((2, 2, 2), (1, 1, 1), 1),
    ),
    "bk-sdm-base": publish_unet("BK-SDM-Base", 0.6, cross_attention_dim=768, layers_per_block=1),
    "koala-1b": PUBLISHED["koala-1b"],
}
