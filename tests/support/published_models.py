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


DEFAULTS = "the defaults of the class"
FLUX2 = "FLUX.2's repository, src/flux2/model.py; no embedding of guidance, as ComfyUI detects them"
KOALA = "KOALA's paper, table 1 (arXiv:2312.04005), and ComfyUI, comfy/supported_models.py"
SD3_ENCODERS = ("clip-l", "clip-bigg", "t5-xxl")
SDXL_ENCODERS = SD3_ENCODERS[:2]


def koala(depth: int, *, mid: bool) -> dict[str, object]:
    """SDXL with one layer a block, and `depth` transformer blocks where it has ten."""
    return {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid else None,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, depth),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


PUBLISHED = {
    "flux1-dev": Published(
        "FLUX.1 [dev]",
        "FluxTransformer2DModel",
        11.9,
        "diffusers, scripts/convert_flux_to_diffusers.py",
        {"guidance_embeds": True},
        ("clip-l", "t5-xxl"),
    ),
    "flux1-schnell": Published(
        "FLUX.1 [schnell]", "FluxTransformer2DModel", 11.9, DEFAULTS, {}, ("clip-l", "t5-xxl")
    ),
    "qwen-image": Published(
        "Qwen-Image", "QwenImageTransformer2DModel", 20.4, DEFAULTS, {}, ("qwen2.5-vl-7b",)
    ),
    "z-image": Published("Z-Image", "ZImageTransformer2DModel", 6.2, DEFAULTS, {}, ("qwen3-4b",)),
    "flux2-dev": Published(
        "FLUX.2 [dev]", "Flux2Transformer2DModel", 32.2, DEFAULTS, {}, ("mistral-small-24b",)
    ),
    "flux2-klein-9b": Published(
        "FLUX.2 [klein] 9B",
        "Flux2Transformer2DModel",
        9.1,
        FLUX2,
        {
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        ("qwen3-8b",),
    ),
    "flux2-klein-4b": Published(
        "FLUX.2 [klein] 4B",
        "Flux2Transformer2DModel",
        3.9,
        FLUX2,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        ("qwen3-4b",),
    ),
    "flux1-fill": Published(
        "FLUX.1 Fill [dev]",
        "FluxTransformer2DModel",
        11.9,
        "diffusers, scripts/convert_flux_to_diffusers.py",
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        ("clip-l", "t5-xxl"),
    ),
    "chroma": Published("Chroma", "ChromaTransformer2DModel", 8.9, DEFAULTS, {}, ("t5-xxl",)),
    "sd3-medium": Published(
        "Stable Diffusion 3 Medium",
        "SD3Transformer2DModel",
        2.0,
        "diffusers, scripts/convert_sd3_to_diffusers.py",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        SD3_ENCODERS,
    ),
    "sd3.5-medium": Published(
        "Stable Diffusion 3.5 Medium",
        "SD3Transformer2DModel",
        2.2,
        "diffusers, scripts/convert_sd3_to_diffusers.py",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        SD3_ENCODERS,
    ),
    "sd3.5-large": Published(
        "Stable Diffusion 3.5 Large",
        "SD3Transformer2DModel",
        8.1,
        "diffusers, scripts/convert_sd3_to_diffusers.py",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        SD3_ENCODERS,
    ),
    "pixart-alpha": Published(
        "PixArt-α (1024)",
        "PixArtTransformer2DModel",
        0.6,
        "diffusers, scripts/convert_pixart_alpha_to_diffusers.py",
        {"caption_channels": 4096, "use_additional_conditions": True},
        ("t5-xxl",),
    ),
    "pixart-sigma": Published(
        "PixArt-Σ (1024)",
        "PixArtTransformer2DModel",
        0.6,
        "diffusers, scripts/convert_pixart_sigma_to_diffusers.py",
        {"caption_channels": 4096, "use_additional_conditions": False},
        ("t5-xxl",),
    ),
    "auraflow": Published(
        "AuraFlow", "AuraFlowTransformer2DModel", 6.8, DEFAULTS, {}, ("pile-t5-xl",)
    ),
    "lumina2": Published(
        "Lumina Image 2.0",
        "Lumina2Transformer2DModel",
        2.6,
        "diffusers, scripts/convert_lumina_to_diffusers.py",
        {"cap_feat_dim": 2304},
        ("gemma2-2b",),
    ),
    "hidream-i1": Published(
        "HiDream-I1",
        "HiDreamImageTransformer2DModel",
        17.1,
        "ComfyUI, comfy/model_detection.py",
        {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096]},
        ("clip-l", "clip-bigg", "t5-xxl", "llama3.1-8b"),
    ),
    "krea2": Published("Krea 2", "Krea2Transformer2DModel", 12.8, DEFAULTS, {}, ("qwen3-vl-4b",)),
    "qwen-image-2.1": Published(
        "Qwen-Image 2.1", "QwenImage21Transformer2DModel", 7.1, DEFAULTS, {}, ("qwen3-vl-8b",)
    ),
    "koala-1b": Published(
        "KOALA 1B", "UNet2DConditionModel", 1.2, KOALA, koala(6, mid=True), SDXL_ENCODERS
    ),
    "koala-700m": Published(
        "KOALA 700M", "UNet2DConditionModel", 0.8, KOALA, koala(5, mid=False), SDXL_ENCODERS
    ),
}
