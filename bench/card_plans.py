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
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

from prolora.errors import TooLittleMemory
from prolora.files.sizes import parse_size
from prolora.fitting.pipelines import memory_bounds
from prolora.fitting.settings import FitSettings
from prolora.fitting.swapping import count_staying

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))

from checkpoints import sparse_file
from make_layouts import build_model
from published_models import PUBLISHED
from published_unets import UNETS

RANK = 32
CARDS = (8, 12, 16, 24)
PASSES = 4.25
"""Visits of a block in a Gauss–Newton step: forward, backward, two trials, and in every fourth step
the curvature. Two of Adam's make four."""
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
VAE["down_block_types"] = ("DownEncoderBlock2D",) * 4
VAE["up_block_types"] = ("UpDecoderBlock2D",) * 4
MODELS = {
    "SD1.5": ("sd15", "AutoencoderKL", VAE),
    "SDXL": ("sdxl", "AutoencoderKL", VAE),
    "FLUX.1": ("flux1-dev", "AutoencoderKL", VAE | {"latent_channels": 16}),
    "FLUX.2 klein 4B": ("flux2-klein-4b", "AutoencoderKLFlux2", {}),
    "Qwen-Image": ("qwen-image", "AutoencoderKLQwenImage", {}),
}
"""Name -> the published size of its denoiser, and class and configuration of its VAE."""


def write_pipeline(name: str, folder: Path) -> None:
    """The folder of a pipeline without values; 16-bit weights as published, the VAE too."""
    size, vae, config = MODELS[name]
    denoiser = build_model((UNETS | PUBLISHED)[size])
    with torch.device("meta"):
        parts = {"vae": getattr(diffusers, vae)(**config)}
    parts["unet" if size in UNETS else "transformer"] = denoiser
    index = {"_class_name": "DiffusionPipeline"}
    for part, model in parts.items():
        index[part] = ["diffusers", type(model).__name__]
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        sparse_file(folder / part / "diffusion_pytorch_model.safetensors", shapes, "BF16")
        stored = {key: value for key, value in model.config.items() if not key.startswith("_")}
        (folder / part / "config.json").write_text(json.dumps(stored))
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
        folders = {name: Path(place) / name for name in MODELS}
        for name, folder in folders.items():
            write_pipeline(name, folder)
        for source, target, crosses in pairs:
            for size in (512, 1024):
                ends = folders[source], folders[target]
                cells = [tell(n * 10**9, ends, size, crosses) for n in CARDS]
                least = f"{find_least(ends, size, crosses):.1f}"
                rest = f"{sum(memory_bounds._measure(ends[1], size).blocks) / 1e9:.1f}"
                print(f"| {source} → {target}, {size}² | {least} | {rest} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
