"""LoRA files as kohya's sd-scripts writes them, and adding one to a UNet by module name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
]


def sgm_name(name: str) -> str:
    """Respells a diffusers module name the way SDXL's original code (SGM) counts blocks.

    ``down_blocks.1.attentions.0.x`` -> ``input_blocks.4.1.x``: the input blocks are conv_in and
    then, per stage, two layers and a downsampler; the output blocks are three layers per stage.
    In each of these blocks entry 0 is the resnet and entry 1 the attention.
    """
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0.", "middle_block.1.")
    side, stage, layer, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name
    ).groups()
    block = 3 * int(stage) + int(layer)
    where = f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}"
    return f"{where}.1.{rest}"


def save_kohya(
    factors: dict[str, Tensor], alpha: float, style: str, path: Path, names: str, steps: int
) -> None:
    """Writes PEFT factors as a kohya LoRA in half precision."""
    tensors = {}
    for key, down in factors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        spelled = sgm_name(module) if names == "sgm" else module
        prefix = "lora_unet_" + spelled.replace(".", "_")
        tensors[f"{prefix}.lora_down.weight"] = down.half().contiguous()
        tensors[f"{prefix}.lora_up.weight"] = factors[f"{module}.lora_B.weight"].half().contiguous()
        tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha), dtype=torch.float16)
        rank = len(down)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_network_dropout": "None",
        "ss_base_model_version": "mini_family",
        "ss_sd_model_name": "mini_family_source.safetensors",
        "ss_output_name": style,
        "ss_steps": str(steps),
        "ss_mixed_precision": "no",
        "ss_optimizer": "torch.optim.AdamW",
        "ss_resolution": "(16, 16)",
        "ss_tag_frequency": json.dumps({f"1_{style}": {f"{style} digit": 4500}}),
        "ss_training_comment": f"{style} handwritten digits at 16x16",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "mini-family-unet/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"mini family: {style}",
        "modelspec.description": f"Turns the digits of the mini family {style}.",
        "modelspec.trigger_phrase": f"{style} digit",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "v",
    }
    save_file(tensors, path, metadata=header)


def add_by_name(unet: nn.Module, path: Path, strength: float = 1.0) -> tuple[int, int]:
    """Adds a LoRA of either spelling to the modules of equal name: the "copy" baseline."""
    modules = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".attentions." in name:
            modules[name.replace(".", "_")] = module
            modules[sgm_name(name).replace(".", "_")] = module
    with safe_open(path, framework="pt") as file:
        keys = [k.removesuffix(".alpha") for k in file.keys() if k.endswith(".alpha")]
        found = [k for k in keys if k.removeprefix("lora_unet_") in modules]
        for key in found:
            down = file.get_tensor(f"{key}.lora_down.weight").float()
            up = file.get_tensor(f"{key}.lora_up.weight").float()
            scale = strength * file.get_tensor(f"{key}.alpha").item() / len(down)
            modules[key.removeprefix("lora_unet_")].weight.data.add_(up @ down, alpha=scale)
    return len(found), len(keys) - len(found)
