"""The models whose tables are made from diffusers' classes, with the configurations they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Published:
    """A published size of a model."""

    title: str  # for people
    cls: str  # its class in diffusers; empty where there is none
    billions: float  # parameters in all, as the class makes them: what is published, to more digits
    source: str  # where its configuration is known from
    # what differs from the defaults of the class
    config: dict[str, object] = field(default_factory=dict)
    text_encoders: tuple[str, ...] = ()  # what it reads, in order
    # part of its files that is another model in diffusers -> the class of that
    attached: dict[str, str] = field(default_factory=dict)
    # what makes it on the meta device, where diffusers has no class of it
    build: Callable[[], nn.Module] | None = None


DEFAULTS, SCRIPT = "the defaults of the class", "diffusers, scripts/convert_{}_to_diffusers.py"
FLUX = SCRIPT.format("flux")
FLUX2 = "FLUX.2's repository, src/flux2/model.py; no embedding of guidance, as ComfyUI detects them"
KOALA = "KOALA's paper, table 1 (arXiv:2312.04005), and ComfyUI, comfy/supported_models.py"
CLIP_T5, T5, SD3_ENCODERS = "clip-l t5-xxl", "t5-xxl", "clip-l clip-bigg t5-xxl"


def publish(
    title: str, cls: str, billions: float, source: str, encoders: str = "", **config: object
) -> Published:
    """A size that diffusers has a class of; encoders in words, with spaces between them."""
    return Published(title, cls, billions, source, config, tuple(encoders.split()))


def publish_flux(name: str, source: str = FLUX, **config: object) -> Published:
    return publish(f"FLUX.1 {name}", "FluxTransformer2DModel", 11.9, source, CLIP_T5, **config)


def publish_klein(
    billions: float, encoder: str, heads: int, width: int, **config: object
) -> Published:
    title, cls = f"FLUX.2 [klein] {round(billions):.0f}B", "Flux2Transformer2DModel"
    sizes = {"num_attention_heads": heads, "joint_attention_dim": width, "guidance_embeds": False}
    return publish(title, cls, billions, FLUX2, encoder, **sizes, **config)


def publish_sd3(
    title: str, billions: float, layers: int, positions: int, **config: object
) -> Published:
    sizes = {"num_layers": layers, "num_attention_heads": layers}
    sizes |= {"caption_projection_dim": 64 * layers, "pos_embed_max_size": positions}
    title, source = f"Stable Diffusion {title}", SCRIPT.format("sd3")
    cls = "SD3Transformer2DModel"
    return publish(title, cls, billions, source, SD3_ENCODERS, **sizes, **config)


def publish_pixart(title: str, name: str, micro: bool) -> Published:
    config = {"caption_channels": 4096, "use_additional_conditions": micro}
    source = SCRIPT.format(f"pixart_{name}")
    return publish(title, "PixArtTransformer2DModel", 0.6, source, T5, **config)


def publish_koala(title: str, billions: float, depth: int, mid: str | None) -> Published:
    """SDXL with one layer a block, and `depth` transformer blocks where it has ten."""
    config = {
        **SDXL,
        "mid_block_type": mid,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, depth),
    }
    return publish(title, "UNet2DConditionModel", billions, KOALA, "clip-l clip-bigg", **config)


SDXL: dict[str, object] = {
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
LUMINA2, HIDREAM = SCRIPT.format("lumina"), "ComfyUI, comfy/model_detection.py"
LLAMA = f"{SD3_ENCODERS} llama3.1-8b"
HIDREAM_SIZES = {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096]}
DUAL = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
FILL = {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}
LUMINA2_TEXT = {"cap_feat_dim": 2304}
PUBLISHED = {
    "flux1-dev": publish_flux("[dev]", guidance_embeds=True),
    "flux1-schnell": publish_flux("[schnell]", DEFAULTS),
    "qwen-image": publish(
        "Qwen-Image", "QwenImageTransformer2DModel", 20.4, DEFAULTS, "qwen2.5-vl-7b"
    ),
    "z-image": publish("Z-Image", "ZImageTransformer2DModel", 6.2, DEFAULTS, "qwen3-4b"),
    "flux2-dev": publish(
        "FLUX.2 [dev]", "Flux2Transformer2DModel", 32.2, DEFAULTS, "mistral-small-24b"
    ),
    "flux2-klein-9b": publish_klein(9.1, "qwen3-8b", 32, 12288, num_single_layers=24),
    "flux2-klein-4b": publish_klein(3.9, "qwen3-4b", 24, 7680, num_layers=5, num_single_layers=20),
    "flux1-fill": publish_flux("Fill [dev]", **FILL),
    "chroma": publish("Chroma", "ChromaTransformer2DModel", 8.9, DEFAULTS, T5),
    "sd3-medium": publish_sd3("3 Medium", 2.0, 24, 192),
    "sd3.5-medium": publish_sd3("3.5 Medium", 2.2, 24, 384, **DUAL),
    "sd3.5-large": publish_sd3("3.5 Large", 8.1, 38, 192, qk_norm="rms_norm"),
    "pixart-alpha": publish_pixart("PixArt-α (1024)", "alpha", micro=True),
    "pixart-sigma": publish_pixart("PixArt-Σ (1024)", "sigma", micro=False),
    "auraflow": publish("AuraFlow", "AuraFlowTransformer2DModel", 6.8, DEFAULTS, "pile-t5-xl"),
    "lumina2": publish(
        "Lumina Image 2.0", "Lumina2Transformer2DModel", 2.6, LUMINA2, "gemma2-2b", **LUMINA2_TEXT
    ),
    "hidream-i1": publish(
        "HiDream-I1", "HiDreamImageTransformer2DModel", 17.1, HIDREAM, LLAMA, **HIDREAM_SIZES
    ),
    "krea2": publish("Krea 2", "Krea2Transformer2DModel", 12.8, DEFAULTS, "qwen3-vl-4b"),
    "qwen-image-2.1": publish(
        "Qwen-Image 2.1", "QwenImage21Transformer2DModel", 7.1, DEFAULTS, "qwen3-vl-8b"
    ),
    "koala-1b": publish_koala("KOALA 1B", 1.2, 6, "UNetMidBlock2DCrossAttn"),
    "koala-700m": publish_koala("KOALA 700M", 0.8, 5, None),
}
