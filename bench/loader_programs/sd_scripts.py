"""sd-scripts: the networks that its scripts make from the keys of a file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prolora.architectures.family import Family

from .common import Keys, Open, Read, enter, fit_factors
from .text_encoders import build_encoder

Module = Callable[[str], Any]
ANIMA = dict(
    max_img_h=512,
    max_img_w=512,
    max_frames=128,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=2048,
    crossattn_emb_channels=1024,
    pos_emb_cls="rope3d",
    use_adaln_lora=True,
    num_blocks=28,
    use_llm_adapter=True,
)


def build_unet(module: Module, **options: object) -> nn.Module:
    return module("original_unet").UNet2DConditionModel(sample_size=64, **options)


def build_flux(module: Module) -> nn.Module:
    models = module("flux_models")
    return models.Flux(models.configs["dev"].params)


def build_sd3(module: Module, depth: int, **options: object) -> nn.Module:
    return module("sd3_models").MMDiT(
        input_size=None,
        pos_embed_max_size=192,
        num_patches=192**2,
        in_channels=16,
        adm_in_channels=2048,
        context_embedder_in_features=4096,
        context_embedder_out_features=64 * depth,
        depth=depth,
        **options,
    )


MODELS: dict[str, tuple[str, Callable[[Module], nn.Module], tuple[str, ...]]] = {
    "sd15": (
        "lora",
        lambda module: build_unet(module, attention_head_dim=8, cross_attention_dim=768),
        ("clip-l",),
    ),
    "sd21": (
        "lora",
        lambda module: build_unet(
            module,
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        ),
        ("clip-h",),
    ),
    "sdxl": (
        "lora",
        lambda module: module("sdxl_original_unet").SdxlUNet2DConditionModel(),
        ("clip-l", "clip-bigg"),
    ),
    "flux1-dev": ("lora_flux", build_flux, ("clip-l", "t5-xxl")),
    "chroma": (
        "lora_flux",
        lambda module: module("chroma_models").Chroma(module("chroma_models").chroma_params),
        ("clip-l", "t5-xxl"),
    ),
    "sd3-medium": (
        "lora_sd3",
        lambda module: build_sd3(module, 24, model_type="sd3m"),
        ("clip-l", "clip-bigg", "t5-xxl"),
    ),
    "sd3.5-medium": (
        "lora_sd3",
        lambda module: build_sd3(
            module,
            24,
            qk_norm="rms",
            x_block_self_attn_layers=list(range(13)),
            model_type="sd3-5-medium",
        ),
        ("clip-l", "clip-bigg", "t5-xxl"),
    ),
    "lumina2": (
        "lora_lumina",
        lambda module: module("lumina_models").NextDiT_2B_GQA_patch2_Adaln_Refiner(),
        (),
    ),
    "hunyuan-image": (
        "lora_hunyuan_image",
        lambda module: module("hunyuan_image_models").HYImageDiffusionTransformer(),
        (),
    ),
    "anima": ("lora_anima", lambda module: module("anima_models").Anima(**ANIMA), ()),
}
"""Layout -> (the file with its networks, what builds its model, its text encoders)."""


def open_program(checkout: Path) -> Open:
    """`create_network_from_weights`, which makes a module for each of its own that a file has."""
    enter(checkout, "cv2", "imagesize", "toml", "voluptuous", "torchvision", "sentencepiece")

    def open_model(family: Family, layout: str) -> Read | None:
        if layout not in MODELS:
            return None
        file, build, texts = MODELS[layout]
        networks = importlib.import_module(f"networks.{file}")
        with torch.device("meta"):
            model = build(lambda name: importlib.import_module(f"library.{name}"))
            encoders = [build_encoder(text) for text in texts]
        encoders = encoders or [nn.Module()]  # Gemma or Qwen, of which nothing is measured

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            if not any("lora_down" in key for key in tensors):
                return set()  # it looks at no other keys, and making modules takes long
            both = encoders if family.id != "sd15" else encoders[0]
            with torch.device("meta"):
                network, _ = networks.create_network_from_weights(
                    1.0, None, None, both, model, weights_sd=tensors, for_inference=True
                )
            return fit_factors([*network.text_encoder_loras, *network.unet_loras], tensors)

        return read

    return open_model
