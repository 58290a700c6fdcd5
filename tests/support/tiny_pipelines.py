"""Whole diffusers pipelines of a few thousand weights, saved as folders, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prolora import LowRank

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "attention_head_dim": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
FLUX = {
    "patch_size": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
ALPHAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters alone: no merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def vae(scaling: float = 0.18215, seed: int = 0) -> AutoencoderKL:
    """Always the same one for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**VAE, scaling_factor=scaling)


def text_encoder(width: int, kind: type = CLIPTextModel) -> nn.Module:
    """Two layers."""
    return kind(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
            projection_dim=width,
        )
    )


def save(
    folder: Path,
    *,
    seed: int = 0,
    text: int = 8,
    kind: str = "epsilon",
    vae_seed: int = 0,
    scaling: float = 0.18215,
    unet: UNet2DConditionModel | None = None,
    scheduler: str = "ddim",
) -> Path:
    """A Stable Diffusion pipeline whose text encoder has the width `text`."""
    torch.manual_seed(seed)
    made = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[scheduler]
    pipe = StableDiffusionPipeline(
        vae=vae(scaling, vae_seed),
        text_encoder=text_encoder(text),
        tokenizer=tokenizer(folder / "vocabulary"),
        unet=unet or UNet2DConditionModel(**UNET, cross_attention_dim=text),
        scheduler=made(prediction_type=kind, **ALPHAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def updates(model: nn.Module, leaves: tuple[str, ...], size: float = 0.3) -> dict[str, LowRank]:
    """Random updates of rank 2 of the linear modules that end so."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name and name.endswith(leaves):
            m, n = module.weight.shape
            up = size * torch.randn(m, 2, generator=generator)
            found[name] = LowRank(up, torch.randn(2, n, generator=generator) / n**0.5)
    return found


def save_ends(
    folder: Path, names: tuple[str, str] = ("source", "target"), **target: Any
) -> tuple[Path, Path, Path]:
    """Saves two pipelines that were trained apart, and a LoRA of the first; returns all three."""
    ours, theirs = (folder / name for name in names)
    save(ours)
    save(theirs, seed=5, **target)
    unet = UNet2DConditionModel.from_pretrained(ours / "unet")
    return write_lora(folder / "lora.safetensors", updates(unet, ("attn1.to_v",))), ours, theirs


def write_lora(file: Path, found: dict[str, LowRank], prefix: str = "lora_unet") -> Path:
    """A kohya file of rank 2."""
    save_file(spell_updates(found, prefix), file)
    return file


def spell_updates(found: dict[str, LowRank], prefix: str) -> dict[str, torch.Tensor]:
    """Updates of rank 2 as kohya's tensors, with alpha 2."""
    tensors = {}
    for name, update in found.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors[f"{key}.lora_up.weight"] = update.up.contiguous()
        tensors[f"{key}.lora_down.weight"] = update.down.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


def write_lora_with_text(file: Path, pipe: StableDiffusionPipeline, size: float = 1.0) -> Path:
    """A kohya file of rank 2 with a part in the text encoder."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for prefix, model, leaves in (
        ("lora_unet", pipe.unet, ("attn1.to_v", "attn2.to_v")),
        ("lora_te_text_model", pipe.text_encoder, ("mlp.fc1", "mlp.fc2")),
    ):
        found = {}
        for name, module in model.named_modules():
            if name.endswith(leaves):
                m, n = module.weight.shape
                up = size * torch.randn(m, 2, generator=generator)
                found[name] = LowRank(up, torch.randn(2, n, generator=generator))
        tensors |= spell_updates(found, prefix)
    save_file(tensors, file)
    return file
