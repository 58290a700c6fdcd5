"""LightX2V: its pairs of factors, held against the weights of a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout

from .common import Keys, Open, Read, enter, name_weights, with_alphas

LIGHTX2V_NAMES = {"ltx2": "model.diffusion_model.", "qwen-image": "", "wan": "", "z-image": ""}
"""Families whose runners apply LoRAs -> what stands before the names of the weights there.

Z-Image's are diffusers' names, the others' are the authors', which Qwen-Image shares.
"""


def open_program(checkout: Path) -> Open:
    """LightX2V's `LoRALoader.extract_lora_pairs`, held against the weights of the checkpoint."""
    enter(checkout, "loguru")
    path = checkout / "lightx2v/utils/lora_loader.py"
    spec = importlib.util.spec_from_file_location("lightx2v_lora_loader", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def open_model(family: Family, layout: str) -> Read | None:
        prefix = LIGHTX2V_NAMES.get(family.id)
        if prefix is None:
            return None
        weights = {f"{prefix}{name}": shape for name, shape in name_weights(family, layout).items()}
        if family.id == "z-image":
            weights = {f"{n}.weight": shape for n, shape in load_layout(layout).shapes.items()}
        loader = module.LoRALoader(model_prefix=prefix or None)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            taken = set()
            for name, pair in loader.extract_lora_pairs(tensors).items():
                up, down = tensors[pair["up_key"]], tensors[pair["down_key"]]
                if weights.get(name) == (len(up), down.shape[1]):
                    taken |= {pair["up_key"], pair["down_key"]}
            return with_alphas(taken, tensors)

        return read

    return open_model
