"""Moves a 560-module SDXL LoRA to SSD-1B and asks diffusers what it makes of the result.

    python bench/diffusers_check.py FOLDER [--scale 8] [--format kohya] [--method prolora]

At full size (scale 1) this builds the real 1.3-billion-parameter UNet and needs about 8 GB. Prints
how many modules diffusers attached, its warnings, and the largest relative difference between the
ΔW that its layers hold and the ΔW that prolora computed.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import sdxl
import torch
from torch import nn

import prolora

# SSD-1B as diffusers builds it.
SSD_1B: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "norm_num_groups": 8,
}


def ssd_1b(scale: int, dtype: torch.dtype) -> nn.Module:
    """An SSD-1B UNet with all widths divided by `scale` and arbitrary weights."""
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        widths = [width // scale for width in (320, 640, 1280)]
        return UNet2DConditionModel(
            **SSD_1B, block_out_channels=widths, cross_attention_dim=2048 // scale
        )
    finally:
        torch.set_default_dtype(before)


class Warnings(logging.Handler):
    """Keeps what diffusers and peft complain about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def load_in_diffusers(path: Path, unet: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Attaches the file and gives {module: ΔW in float64}, and the warnings that were logged."""
    from diffusers import StableDiffusionXLPipeline

    heard = Warnings()
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "py.warnings")]
    for logger in loggers:
        logger.addHandler(heard)
    logging.captureWarnings(True)
    try:
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(path), unet_config=unet.config, return_lora_metadata=True
        )
        unet.load_lora_adapter(state, network_alphas=alphas, metadata=metadata, prefix="unet")
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(heard)
    attached = {}
    for name, module in unet.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        (adapter,) = module.lora_A
        attached[name] = module.get_delta_weight(adapter).detach().double()
    return attached, heard.messages


def check(folder: Path, scale: int, format: str, method: str, **options: Any) -> dict[str, Any]:
    """Generates, transfers, loads and compares; see the module's docstring."""
    files = sdxl.write_all(folder, scale=scale)
    done = prolora.transfer(files.lora, files.source, files.target, method=method, **options)
    out = folder / f"out-{format}.safetensors"
    done.save(out, format=format, dtype=torch.float32)
    attached, warnings = load_in_diffusers(out, ssd_1b(scale, torch.float32))
    worst = 0.0
    for name, update in done.adapter.updates.items():
        ours = update.up.double() @ update.down.double()
        worst = max(worst, float((attached[name] - ours).norm() / ours.norm()))
    return {
        "computed": len(done.adapter.updates),
        "attached": len(attached),
        "same modules": set(attached) == set(done.adapter.updates),
        "warnings": warnings,
        "largest relative difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--format", default="kohya")
    parser.add_argument("--method", default="prolora")
    words = parser.parse_args()
    for name, value in check(words.folder, words.scale, words.format, words.method).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
