"""mflux: the patterns of its mappings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from prolora.architectures.family import Family

from .common import Keys, Open, Read, enter

MFLUX_MAPPINGS = {
    "cosmos": "anima.weights.anima_lora_mapping:AnimaLoRAMapping",
    "ernie-image": "ernie_image.weights.ernie_lora_mapping:ErnieLoRAMapping",
    "flux": "flux.weights.flux_lora_mapping:FluxLoRAMapping",
    "flux2": "flux2.weights.flux2_lora_mapping:Flux2LoRAMapping",
    "flux3": "flux3.weights.flux3_lora_mapping:Flux3LoRAMapping",
    "ideogram4": "ideogram4.weights.ideogram4_lora_mapping:Ideogram4LoRAMapping",
    "krea2": "krea2.weights.krea2_lora_mapping:Krea2LoRAMapping",
    "qwen-image": "qwen.weights.qwen_lora_mapping:QwenLoRAMapping",
    "qwen-image-2.1": "qwen21.weights.qwen21_lora_mapping:Qwen21LoRAMapping",
    "z-image": "z_image.weights.z_image_lora_mapping:ZImageLoRAMapping",
}


def blank_numbers(name: str) -> str:
    """A key, or a pattern of keys with {block} in it, without its numbers."""
    return re.sub(r"\{block\}|\d+", "#", name)


def open_program(checkout: Path) -> Open:
    """mflux's `LoRALoader`: the patterns of the family's mapping that a key matches."""
    enter(checkout, "mlx", "PIL", "piexif", "toml", "platformdirs", "filelock", "cv2", "matplotlib")
    loader = importlib.import_module("mflux.models.common.lora.mapping.lora_loader").LoRALoader

    def open_model(family: Family, layout: str) -> Read | None:
        if family.id not in MFLUX_MAPPINGS or layout.startswith("cosmos"):
            return None
        module, _, name = MFLUX_MAPPINGS[family.id].partition(":")
        mapping = getattr(importlib.import_module(f"mflux.models.{module}"), name)
        # Every key against every pattern takes minutes: those of other names are left out.
        patterns: dict[str, list[Any]] = {}
        for one in loader._build_pattern_mappings(mapping.get_mapping()):
            patterns.setdefault(blank_numbers(one.source_pattern), []).append(one)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            found: dict[str, set[str]] = {}
            for key in tensors:
                for one in patterns.get(blank_numbers(key), ()):
                    if loader._match_pattern(key, one.source_pattern) is not None:
                        found.setdefault(key, set()).add(one.matrix_name)
            factors = {key for key, names in found.items() if names & {"lora_A", "lora_B"}}
            paths = [
                {key.rpartition(end)[0] for key in factors if end in key}
                for end in (".lora_A", ".lora_B", ".lora_down", ".lora_up")
            ]
            whole = (paths[0] & paths[1]) | (paths[2] & paths[3])
            alphas = {key for key, names in found.items() if names == {"alpha"}}
            taken = {key for key in factors if key.rpartition(".lora_")[0] in whole} | alphas
            # A scale that is not read changes what the factors do.
            lost = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
            lost -= {key.removesuffix(".alpha") for key in alphas}
            return {key for key in taken if key.rpartition(".lora_")[0] not in lost}

        return read

    return open_model
