"""Text encoders on the meta device, with the names that programs know them by.

transformers 5 dropped the outer `text_model.` of CLIP's modules, which all checkpoints have.
"""

from __future__ import annotations

import torch
from torch import nn

CLIP = {
    "clip-l": (768, 12),
    "clip-h": (1024, 23),
    "clip-bigg": (1280, 32),
}
"""Encoder -> width and layers; SD2.1 has no last layer."""


def build_clip(name: str) -> nn.Module:
    """An encoder with `text_model.` before all names, as up to transformers 4."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers = CLIP[name]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    model = CLIPTextModel(config)
    if hasattr(model, "text_model"):
        return model
    outer = nn.Module()
    outer.text_model = model
    return outer


def build_t5() -> nn.Module:
    """The encoder of T5-XXL."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128
    )
    config.feed_forward_proj = "gated-gelu"
    config.is_gated_act, config.dense_act_fn = True, "gelu_new"
    return T5EncoderModel(config)


def list_weights(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The weights of encoders as ComfyUI calls them, `clip_l.transformer.text_model…`."""
    kinds = {"clip_l": "clip-l", "clip_h": "clip-h", "clip_g": "clip-bigg"}
    weights = {}
    with torch.device("meta"):
        for name in names:
            model = build_clip(kinds[name]) if name in kinds else build_t5()
            for key, value in model.state_dict().items():
                weights[f"{name}.transformer.{key}"] = tuple(value.shape)
    return weights
