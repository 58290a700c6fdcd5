"""What probing costs at full size, counted on models without values: flops, weights, activations.

`python bench/probe_cost.py` prints JSON. Nothing is run: the models are on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ATTENTION = r".*transformer_blocks\.\d+\.attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
ALL = ATTENTION + r"|.*transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)"
ALL += r"|.*transformer_blocks\.\d+\.proj_(mlp|out)"


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: inputs, output and one number a row."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FusedAttention:
    """Attention as one call, counted by its two products; inside `with`, all models use it."""

    def __init__(self) -> None:
        self.flops = 0
        self.replaced = nn.functional.scaled_dot_product_attention

    def __enter__(self) -> FusedAttention:
        nn.functional.scaled_dot_product_attention = self
        return self

    def __exit__(self, *_: object) -> None:
        nn.functional.scaled_dot_product_attention = self.replaced

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
        n, heads, tokens, width = query.shape
        self.flops += 4 * n * heads * tokens * key.shape[2] * width
        return _Attention.apply(query, key, value)


def sdxl(size: int = 1024) -> tuple[nn.Module, dict[str, object]]:
    """The UNet and one sample of so many pixels a side."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        return model, {
            "sample": torch.empty(1, 4, size // 8, size // 8),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "added_cond_kwargs": added,
        }


def flux(size: int = 1024) -> tuple[nn.Module, dict[str, object]]:
    """The transformer of FLUX.1 dev and one sample of so many pixels a side."""
    tokens = (size // 16) ** 2
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        return model, {
            "hidden_states": torch.empty(1, tokens, 64),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "guidance": torch.ones(1),
            "pooled_projections": torch.empty(1, 768),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(512, 3),
        }


def match_modules(model: nn.Module, pattern: str) -> list[str]:
    """The names of the modules that match."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def count(
    model: nn.Module, sample: dict[str, object], adapted: Collection[str]
) -> dict[str, float]:
    """Counts of one sample, with gradients for the modules of these names."""
    model.requires_grad_(False)
    weights = [model.get_submodule(name).weight.requires_grad_() for name in adapted]
    all_weights = {id(p): p for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        kept[id(base)] = base
        return tensor

    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FusedAttention() as fused, counter, hooks:
        model(**sample, return_dict=False)
    full = [side for weight in weights for side in weight.shape if side <= 4096]
    fitted = {id(weight) for weight in weights}
    frozen = [p for key, p in all_weights.items() if key in kept and key not in fitted]
    activations = [t for key, t in kept.items() if key not in all_weights]
    return {
        "modules": len(weights),
        "weights": sum(weight.numel() for weight in weights),
        "all weights": sum(p.numel() for p in all_weights.values()),
        "factors": sum(side**2 for side in full),
        "Tflop a prediction": (counter.get_total_flops() + fused.flops) / 1e12,
        "activations GB": sum(t.numel() * t.element_size() for t in activations) / 1e9,
        "other weights in float32 GB": sum(4 * p.numel() for p in frozen) / 1e9,
    }


def main() -> None:
    """Prints the counts."""
    counts = {}
    for name, make in (("SDXL", sdxl), ("FLUX.1", flux)):
        for which, pattern in (("attention", ATTENTION), ("attention and feed-forward", ALL)):
            model, sample = make()
            counts[f"{name}, {which}"] = count(model, sample, match_modules(model, pattern))
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
