"""What diffusers' converters and ComfyUI's key maps are asked with."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

COMFYUI_NAMES = Path(__file__).parent / "comfy_names.json.gz"


@cache
def read_comfyui_names() -> dict[str, dict[str, dict[str, list[int]]]]:
    """What ComfyUI of February 2026 says of its models, in the published sizes.

    Layout -> "matrices" (its name -> shape) and "parts" (diffusers' name -> its name, first row and
    rows), from the models it builds and from the key maps it reads LoRAs by.
    """
    names: dict[str, dict[str, dict[str, list[int]]]] = json.loads(
        gzip.decompress(COMFYUI_NAMES.read_bytes())
    )
    return names


class Checkpoint(dict[str, torch.Tensor]):
    """A checkpoint that has all that is asked for: norms, and first columns as biases."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        super().__init__(stored)
        self.stored = dict(stored)

    def pop(self, key: str, *default: object) -> torch.Tensor:  # type: ignore[override]
        matrix = self.stored.get(f"{key.removesuffix('.bias')}.weight", torch.zeros(1, 1))
        return super().pop(key, matrix[:, 0])
