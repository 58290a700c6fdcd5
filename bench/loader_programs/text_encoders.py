"""Text encoders on the meta device, with the names that programs know them by.

transformers 5 dropped the outer `text_model.` of CLIP's modules, which all checkpoints have.
"""

from __future__ import annotations

import torch
from torch import nn

from prolora.architectures.layouts import load_layout

CLIP = {"clip-l": (768, 12), "clip-h": (1024, 23), "clip-bigg": (1280, 32)}
"""Encoder -> width and layers; SD2.1 has no last layer."""


def build_clip(name: str, layers: int | None = None) -> nn.Module:
    """An encoder with `text_model.` before all names, as up to transformers 4."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width, depth = CLIP[name]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers or depth,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    model = CLIPTextModel(config)
    if hasattr(model, "text_model"):
        return model
    outer = nn.Module()
    outer.text_model = model
    return outer


def build_t5(layers: int | None = None) -> nn.Module:
    """The encoder of T5-XXL."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=layers or 24, vocab_size=32128
    )
    config.feed_forward_proj = "gated-gelu"
    config.is_gated_act, config.dense_act_fn = True, "gelu_new"
    return T5EncoderModel(config)


def build_qwen3() -> nn.Module:
    """Qwen3 0.6B, with `model.` before all names, as ComfyUI has it."""
    from transformers import Qwen3Config, Qwen3Model

    outer = nn.Module()
    outer.model = Qwen3Model(
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    )
    return outer


NAMES = {
    "clip-l": "clip_l",
    "clip-h": "clip_h",
    "clip-bigg": "clip_g",
    "t5-xxl": "t5xxl",
    "qwen3-0.6b": "qwen3_06b",
}
"""Encoder -> what ComfyUI calls it."""


def list_weights(layout: str) -> dict[str, tuple[int, ...]]:
    """The weights of a model's encoders as ComfyUI calls them, `clip_l.transformer.text_model…`."""
    weights = {}
    with torch.device("meta"):
        for encoder in load_layout(layout).text_encoders:
            if encoder in NAMES:
                state = build_encoder(encoder).state_dict()
                start = f"{NAMES[encoder]}.transformer."
                weights |= {start + key: tuple(value.shape) for key, value in state.items()}
                if encoder in CLIP:  # comfy/clip_model.py, CLIPTextModel
                    weights[f"{start}text_projection.weight"] = (CLIP[encoder][0],) * 2
    return weights


def build_encoder(name: str, layers: int | None = None) -> nn.Module:
    """CLIP, T5 or Qwen3; the first two of as many layers as they have or of some."""
    if name == "qwen3-0.6b":
        return build_qwen3()
    return build_t5(layers) if name == "t5-xxl" else build_clip(name, layers)
