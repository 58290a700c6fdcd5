"""Forge: the key maps and the reader of LoRAs that it took over from ComfyUI in 2024."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prolora.architectures.family import Family

from .common import Keys, Open, Read, enter, name_weights, with_alphas
from .text_encoders import list_weights

MOST_UNMATCHED = 12
"""Keys without a place above which `load_lora_for_models` drops a file."""
REPOSITORIES = {
    "chroma": "Chroma",
    "flux": "black-forest-labs/FLUX.1-dev",
    "sd15": "sd15",
    "sd21": "sd21",
    "sd3": "stable-diffusion-3.5",
    "sdxl": "sdxl",
    "ssd-1b": "ssd-1b",
}
"""Family -> what stands for the repository that its guess of a checkpoint names."""
SD = dict(
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=(1, 2, 4, 4),
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1,
)
UNETS = {
    "sd15": SD,
    "sd21": SD,
    "sdxl": dict(
        num_res_blocks=[2, 2, 2],
        channel_mult=(1, 2, 4),
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
    ),
    "ssd-1b": dict(
        num_res_blocks=[2, 2, 2],
        channel_mult=(1, 2, 4),
        transformer_depth=[0, 0, 2, 2, 4, 4],
        transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
        transformer_depth_middle=-1,
    ),
}
"""The configurations of UNets, from which it derives diffusers' names."""
FLUX = {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}


def fit_patches(
    patches: dict[Any, Any], tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterable[str]:
    """The keys of factors that fit the rows and columns that they were read for."""
    of = {id(tensor): key for key, tensor in tensors.items()}
    for target, (_, patch) in patches.items():
        name, rows = (target[0], target[1]) if isinstance(target, tuple) else (target, None)
        shape = list(shapes[name])
        if rows is not None:
            shape[rows[0]] = rows[2]
        up, down = patch[:2]
        if [len(up), down[0].numel()] == [shape[0], torch.Size(shape[1:]).numel()]:
            yield from (of[id(up)], of[id(down)])


def open_program(checkout: Path) -> Open:
    """`load_lora` with `model_lora_keys_unet`, then what is left with `model_lora_keys_clip`."""
    enter(checkout)
    lora = importlib.import_module("packages_3rdparty.comfyui_lora_collection.lora")

    def open_model(family: Family, layout: str) -> Read | None:
        if family.id not in REPOSITORIES or layout == "chroma-radiance":
            return None
        stored = name_weights(family, layout)
        shapes = {f"diffusion_model.{name}": shape for name, shape in stored.items()}
        model = SimpleNamespace(
            state_dict=lambda: shapes,
            config=SimpleNamespace(huggingface_repo=REPOSITORIES[family.id]),
            diffusion_model=SimpleNamespace(config=UNETS.get(family.id, FLUX)),
        )
        texts = list_weights(layout)
        _, unet_keys = lora.model_lora_keys_unet(model, {})
        encoders = SimpleNamespace(state_dict=lambda: texts)
        _, text_keys = lora.model_lora_keys_clip(encoders, {})

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            patches, left = lora.load_lora(tensors, unet_keys)
            text_patches, left = lora.load_lora(left, text_keys)
            if len(left) > MOST_UNMATCHED:
                return set()
            taken = {*fit_patches(patches, tensors, shapes)}
            taken |= {*fit_patches(text_patches, tensors, texts)}
            return with_alphas(taken, tensors)

        return read

    return open_model
