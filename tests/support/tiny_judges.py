"""CLIP of a few thousand random weights, saved as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import tiny_pipelines as tiny
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 54, "max_position_embeddings": 8, "bos_token_id": 52, "eos_token_id": 53}
SHOWN = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A model of images and texts, with its processor."""
    torch.manual_seed(seed)
    words = {**SIZE, **WORDS, "pad_token_id": 53}
    config = CLIPConfig(text_config=words, vision_config={**SIZE, **IMAGE}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    words = tiny.tokenizer(folder / "vocabulary")
    CLIPProcessor(CLIPImageProcessor(**SHOWN), words).save_pretrained(folder)
    return folder
