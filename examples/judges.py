"""Judges of images for paper_table.py; add your own to METRICS.

A metric is a function `(images, prompts, wanted) -> a number for each image`, where `wanted` is
what the source draws with the LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ImageChops, ImageStat
from torch import Tensor
from torch.nn.functional import normalize

Metric = Callable[[Sequence[Any], Sequence[str], Sequence[Any]], list[float]]
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
SAFE_WEIGHTS = SAFE | {"use_safetensors": True}


def measure_pixels(images: Any, prompts: Any, wanted: Any) -> list[float]:
    """Minus the root mean square difference of the pixels, from 0 to 1."""
    pairs = zip(images, wanted, strict=True)
    stats = [ImageStat.Stat(ImageChops.difference(a, b)) for a, b in pairs]
    return [-((sum(x / 3 for x in stat.sum2) / stat.count[0]) ** 0.5) / 255 for stat in stats]


def load_clip(folder: Path) -> dict[str, Metric]:
    """CLIP's likeness of image and prompt, and of image and wanted image, as cosines."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, **SAFE_WEIGHTS).eval()
    processor = AutoImageProcessor.from_pretrained(folder, **SAFE)
    tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
    most = model.config.text_config.max_position_embeddings
    length = {"truncation": True, "padding": True, "max_length": most, "return_tensors": "pt"}

    @torch.no_grad()
    def embed(images: Any) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")
        return normalize(model.visual_projection(model.vision_model(**pixels).pooler_output))

    @torch.no_grad()
    def compare_text(images: Any, prompts: Any, wanted: Any) -> list[float]:
        output = model.text_model(**tokenizer(list(prompts), **length)).pooler_output
        return (embed(images) * normalize(model.text_projection(output))).sum(1).tolist()

    return {"CLIP-T": compare_text, "CLIP-I": compare_embeddings(embed)}


def load_dinov2(folder: Path) -> dict[str, Metric]:
    """DINOv2's likeness of image and wanted image, as a cosine."""
    from transformers import AutoImageProcessor, Dinov2Model

    model = Dinov2Model.from_pretrained(folder, **SAFE_WEIGHTS).eval()
    processor = AutoImageProcessor.from_pretrained(folder, **SAFE)

    @torch.no_grad()
    def embed(images: Any) -> Tensor:
        return normalize(model(**processor(list(images), return_tensors="pt")).pooler_output)

    return {"DINOv2": compare_embeddings(embed)}


def compare_embeddings(embed: Callable[[Any], Tensor]) -> Metric:
    """The cosine of what a model makes of an image and of the wanted one."""
    return lambda images, prompts, wanted: (embed(images) * embed(wanted)).sum(1).tolist()


METRICS = {"clip": load_clip, "dinov2": load_dinov2}
