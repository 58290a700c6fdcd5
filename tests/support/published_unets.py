"""Configurations of the UNets whose names follow from arithmetic, as their publishers have them.

KOALA's stand with the transformers in `published_models`.
"""

from __future__ import annotations

from published_models import PUBLISHED, Published

_SDXL: dict[str, object] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}


def publish_unet(title: str, billions: float, **config: object) -> Published:
    source = "the model's own unet/config.json"
    return Published(title, "UNet2DConditionModel", billions, source, config)


UNETS = {
    "sd15": publish_unet("SD1.5", 0.9, cross_attention_dim=768),
    "sd21": publish_unet("SD2.1", 0.9, **_SD21, use_linear_projection=True),
    "sdxl": publish_unet("SDXL", 2.6, **_SDXL, transformer_layers_per_block=(1, 2, 10)),
    "ssd-1b": publish_unet(
        "SSD-1B",
        1.3,
        **_SDXL,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    ),
    "segmind-vega": publish_unet(
        "Segmind-Vega",
        0.7,
        **_SDXL,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (1, 1), (2, 2)),
        reverse_transformer_layers_per_block=((2, 2, 2), (1, 1, 1), 1),
    ),
    "bk-sdm-base": publish_unet(
        "BK-SDM-Base",
        0.6,
        cross_attention_dim=768,
        layers_per_block=1,
    ),
    "koala-1b": PUBLISHED["koala-1b"],
}
