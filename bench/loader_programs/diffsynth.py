"""DiffSynth-Studio: its conversion of names, and the modules of its models."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.modules import matrix_shape

from .common import Keys, Open, Read, enter, mark_pairs, with_alphas

WAN: dict[str, object] = dict(
    dim=5120,
    in_dim=16,
    ffn_dim=13824,
    out_dim=16,
    text_dim=4096,
    freq_dim=256,
    eps=1e-6,
    patch_size=(1, 2, 2),
    num_heads=40,
    num_layers=40,
    has_image_input=False,
)
WAN_OF_IMAGES = WAN | {"in_dim": 36, "has_image_input": True}
DIFFSYNTH_MODELS: dict[str, tuple[str, dict[str, object], str]] = {
    "anima": ("anima_dit:AnimaDiT", {}, ""),
    "ernie-image": ("ernie_image_dit:ErnieImageDiT", {}, ""),
    "flux1-dev": ("flux_dit:FluxDiT", {}, "flux:FluxLoRALoader"),
    "flux2-dev": ("flux2_dit:Flux2DiT", {}, ""),
    "krea2": ("krea2_dit:SingleStreamDiT", {}, "krea2:Krea2LoRALoader"),
    "ltx2": ("ltx2_dit:LTXModel", {}, ""),
    "minimax-h3": ("minimax_h3_dit:MiniMaxH3DiT", {}, "minimax_h3:MiniMaxH3LoRALoader"),
    "qwen-image": ("qwen_image_dit:QwenImageDiT", {}, ""),
    "wan-t2v-14b": ("wan_video_dit:WanModel", WAN, ""),
    "wan2.1-i2v-14b": ("wan_video_dit:WanModel", WAN_OF_IMAGES, ""),
    "z-image": ("z_image_dit:ZImageDiT", {}, ""),
}
"""Layout -> (model's class, its arguments, the loader of LoRAs where the family has its own)."""


MISSING = (
    "modelscope PIL imageio torchvision pandas sentencepiece ftfy scipy librosa torchaudio cv2 "
    "protobuf datasets"
).split()
"""Packages that it imports and this does not need."""


def open_program(checkout: Path) -> Open:
    """DiffSynth's `convert_state_dict`, and the modules of its model by these names."""
    enter(checkout, *MISSING)
    general = importlib.import_module("diffsynth.utils.lora.general").GeneralLoRALoader

    def open_model(family: Family, layout: str) -> Read | None:
        if layout not in DIFFSYNTH_MODELS:
            return None
        model, options, own = DIFFSYNTH_MODELS[layout]
        module, _, name = model.partition(":")
        with torch.device("meta"):
            built = getattr(importlib.import_module(f"diffsynth.models.{module}"), name)(**options)
        shapes = {
            name: matrix_shape(tuple(module.weight.shape))
            for name, module in built.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        }
        loader = general
        if own:
            module, _, name = own.partition(":")
            loader = getattr(importlib.import_module(f"diffsynth.utils.lora.{module}"), name)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            marked, marks = mark_pairs(tensors)
            state, paths = loader().convert_state_dict(marked), set()
            for name, shape in shapes.items():
                up, down = (state.get(f"{name}.lora_{end}.weight") for end in "BA")
                if up is not None and down is not None and (len(up), down[0].numel()) == shape:
                    paths |= {marks[mark] for mark in down.unique().tolist() if mark in marks}
            taken = {key for key in tensors if key.rpartition(".lora_")[0] in paths}
            return with_alphas(taken, tensors)

        return read

    return open_model
