"""What probing costs at full size, counted on models without values: flops, weights, activations.

`python bench/probe_cost.py` prints JSON. Nothing is run: the models are on the meta device.
"""

from __future__ import annotations

import json
import re

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


class _Fused:
    """Attention as one call, counted by its two products."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
        n, heads, tokens, width = query.shape
        self.flops += 4 * n * heads * tokens * key.shape[2] * width
        return _Attention.apply(query, key, value)


def sdxl() -> tuple[nn.Module, dict[str, object]]:
    """The UNet and one sample of 1024 × 1024 pixels."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
        told = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        return model, {
            "sample": torch.empty(1, 4, 128, 128),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "added_cond_kwargs": told,
        }


def flux() -> tuple[nn.Module, dict[str, object]]:
    """The transformer of FLUX.1 dev and one sample of 1024 × 1024 pixels."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        return model, {
            "hidden_states": torch.empty(1, 4096, 64),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "guidance": torch.ones(1),
            "pooled_projections": torch.empty(1, 768),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }


def count(model: nn.Module, sample: dict[str, object], pattern: str) -> dict[str, float]:
    """Counts of one sample, with gradients for the modules that match."""
    model.requires_grad_(False)
    adapted = {n: m for n, m in model.named_modules() if re.fullmatch(pattern, n)}
    for module in adapted.values():
        module.weight.requires_grad_()
    weights = {id(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    fused = _Fused()
    own, nn.functional.scaled_dot_product_attention = (
        nn.functional.scaled_dot_product_attention,
        fused,
    )
    try:
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**sample, return_dict=False)
    finally:
        nn.functional.scaled_dot_product_attention = own
    sides = [side for m in adapted.values() for side in m.weight.shape]
    full = [side for side in sides if side <= 4096]
    return {
        "modules": len(adapted),
        "weights": sum(m.weight.numel() for m in adapted.values()),
        "all weights": sum(p.numel() for p in model.parameters()),
        "factors": sum(side**2 for side in full),
        "Tflop a prediction": (counter.get_total_flops() + fused.flops) / 1e12,
        "activations GB": sum(t.numel() * t.element_size() for t in kept.values()) / 1e9,
    }


def main() -> None:
    """Prints the counts."""
    found = {
        f"{name}, {which}": count(*make(), pattern)
        for name, make in (("SDXL", sdxl), ("FLUX.1", flux))
        for which, pattern in (("attention", ATTENTION), ("attention and feed-forward", ALL))
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
