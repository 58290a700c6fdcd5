"""Trains the terrain study's LoRAs with PEFT; on the target base such a LoRA is the oracle."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from network import Network
from safetensors.torch import save_file
from world import Batch, Maps, ask_base, change_answer

from prolora import LowRank

LINEAR = r".*\.(qkv|proj_out|emb_layers\.1|skip_connection)"
CONVOLUTIONS = r".*\.(qkv|proj_out|emb_layers\.1|skip_connection|in_layers\.2|out_layers\.3)"
ADAPTERS = {"lora-4": (LINEAR, 4), "lora-16": (LINEAR, 16), "locon-16": (CONVOLUTIONS, 16)}
"""Adapter -> (its modules, rank); the first two have no convolutions but those of 1×1."""
RATE = 2e-3


def train_lora(
    base: Network, maps: Maps, idea: str, adapter: str, seed: int, steps: int, batch: int
) -> dict[str, torch.Tensor]:
    """A LoRA of an idea in PEFT's spelling."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    pattern, rank = ADAPTERS[adapter]
    torch.manual_seed(3000 + seed)
    config = LoraConfig(target_modules=pattern, r=rank, lora_alpha=rank)
    model = get_peft_model(copy.deepcopy(base), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for asked, answer in draw_lessons(base, maps, seed, steps, batch):
        wanted = change_answer(base, idea, asked, answer)
        loss = (model(*asked) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {
        key: tensor.detach().clone().contiguous()
        for key, tensor in get_peft_model_state_dict(model).items()
    }


@functools.lru_cache(maxsize=4)
def draw_lessons(
    base: Network, maps: Maps, seed: int, steps: int, batch: int
) -> list[tuple[Batch, torch.Tensor]]:
    """[(what is asked, what the base answers)]: the same ones for every idea."""
    generator = torch.Generator().manual_seed(5000 + seed)
    asked = [maps.draw(False, batch, generator) for _ in range(steps)]
    return [(one, ask_base(base, one)) for one in asked]


def save_lora(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT's tensors; the scale is 1, as α is the rank."""
    save_file(tensors, path)


def save_updates(path: Path, updates: Mapping[str, LowRank]) -> None:
    """Updates in the names that `read_lora` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {}
    for name, update in updates.items():
        parts[f"base_model.model.{name}.lora_A.weight"] = update.down.contiguous()
        parts[f"base_model.model.{name}.lora_B.weight"] = update.up.contiguous()
    save_file(parts, path)


def read_lora(tensors: dict[str, torch.Tensor]) -> dict[str, LowRank]:
    """{module: update} of PEFT's tensors, convolutions as out × in·kh·kw."""
    updates = {}
    for key, down in tensors.items():
        if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
            up = tensors[key.replace("lora_A", "lora_B")]
            updates[found[1]] = LowRank(up.flatten(1), down.flatten(1))
    return updates
