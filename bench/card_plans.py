"""What a fit on a card of some size does, counted: ``python bench/card_plans.py``.

Pipelines of the published sizes are files of headers, without values, made from diffusers' classes
on the meta device. Each row is what `prolora fit --max-vram` plans for a LoRA of rank 32: the least
that is needed, the target's weights in the machine's memory, and for cards of 8, 12, 16 and 24 GB
the precision, small tiles, samples in a batch, the share of the target's blocks that stay while it
is fitted, and what is copied of the others in all steps. Nothing is run.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from prolora.errors import TooLittleMemory
from prolora.files.sizes import parse_size
from prolora.fitting.pipelines import memory_bounds
from prolora.fitting.settings import FitSettings
from prolora.fitting.swapping import count_staying

RANK = 32
CARDS = (8, 12, 16, 24)
PASSES = 4.25
"""Visits of a block in a Gauss–Newton step: forward, backward, two trials, and in every fourth step
the curvature. Two of Adam's make four."""
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
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE["down_block_types"] = ("DownEncoderBlock2D",) * 4
VAE["up_block_types"] = ("UpDecoderBlock2D",) * 4
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
KLEIN |= {"joint_attention_dim": 7680, "guidance_embeds": False}


def build() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Denoiser and VAE by name, without values."""
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        return {
            "SD1.5": (sd15, AutoencoderKL(**VAE)),
            "SDXL": (UNet2DConditionModel(**SDXL), AutoencoderKL(**VAE)),
            "FLUX.1": (
                FluxTransformer2DModel(guidance_embeds=True),
                AutoencoderKL(**VAE, latent_channels=16),
            ),
            "FLUX.2 klein 4B": (Flux2Transformer2DModel(**KLEIN), AutoencoderKLFlux2()),
            "Qwen-Image": (QwenImageTransformer2DModel(), AutoencoderKLQwenImage()),
        }


def write_headers(model: nn.Module, folder: Path, dtype: str) -> None:
    """A model's files, the values being a hole."""
    folder.mkdir(parents=True)
    size, header = {"F16": 2, "BF16": 2, "F32": 4}[dtype], {}
    end = 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + size * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    (folder / "config.json").write_text(json.dumps(config))


def write_pipeline(models: tuple[nn.Module, nn.Module], folder: Path) -> None:
    """The folder of a pipeline; 16-bit weights as they are published, the VAE too."""
    part = "unet" if isinstance(models[0], UNet2DConditionModel) else "transformer"
    write_headers(models[0], folder / part, "BF16")
    write_headers(models[1], folder / "vae", "BF16")
    index = {"_class_name": "DiffusionPipeline"}
    for name, model in ((part, models[0]), ("vae", models[1])):
        index[name] = ["diffusers", type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def tell(limit: int, ends: tuple[Path, Path], size: int, crosses: bool) -> str:
    """What is planned for a card, and what is copied to it in all steps."""
    settings = FitSettings(size=size).sized(10**6)
    try:
        plan = memory_bounds.plan_card(limit, ends, settings, RANK, crosses)
    except TooLittleMemory:
        return "–"
    blocks = memory_bounds._measure(ends[1], size).blocks
    every, stay = sum(blocks), sum(blocks[: count_staying(blocks, plan.fitting)])
    words = ["16 bits" if plan.precision == "bfloat16" else "32 bits"]
    words += ["tiles"] * bool(plan.tile) + [f"× {plan.samples}"] * bool(plan.samples)
    if stay < every:
        passes = settings.fit_steps * math.ceil(settings.batch / plan.samples)
        words.append(f"{stay / every:.0%} stay")
        words.append(f"{PASSES * passes * (every - stay) / 1e12:.0f} TB")
    return ", ".join(words)


def find_least(ends: tuple[Path, Path], size: int, crosses: bool) -> float:
    """GB."""
    try:
        memory_bounds.plan_card(1, ends, FitSettings(size=size), RANK, crosses)
    except TooLittleMemory as error:
        return parse_size(re.search(r"needs ([\d.]+ \w+)", str(error))[1].replace(" ", "")) / 1e9
    raise AssertionError


def main() -> None:
    """Prints the table."""
    pairs = [("SDXL", "SDXL", False), ("SD1.5", "SDXL", True), ("SDXL", "FLUX.1", True)]
    pairs += [("FLUX.1", "FLUX.2 klein 4B", True), ("FLUX.1", "Qwen-Image", True)]
    cards = "".join(f" {n} GB |" for n in CARDS)
    print(f"| source → target | least, GB | at rest, GB |{cards}")
    print("|---" * (3 + len(CARDS)) + "|")
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for name, models in build().items():
            folders[name] = Path(place) / name
            write_pipeline(models, folders[name])
        for source, target, crosses in pairs:
            for size in (512, 1024):
                ends = folders[source], folders[target]
                cells = [tell(n * 10**9, ends, size, crosses) for n in CARDS]
                least = f"{find_least(ends, size, crosses):.1f}"
                rest = f"{sum(memory_bounds._measure(ends[1], size).blocks) / 1e9:.1f}"
                print(f"| {source} → {target}, {size}² | {least} | {rest} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
