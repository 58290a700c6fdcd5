"""What the folder of an adapter holds, here or on the hub."""

from __future__ import annotations

from collections.abc import Container

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLES = ("adapter_model.bin", "pytorch_lora_weights.bin")
ADAPTER_FILES = (PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, *PICKLES)
"""What a folder holds that is an adapter's and not a base model's."""


def choose_files(names: Container[str]) -> list[str]:
    """Returns the files of a folder's adapter, the weights last; empty without any."""
    if PEFT_CONFIG in names:
        return [PEFT_CONFIG, PEFT_WEIGHTS] if PEFT_WEIGHTS in names else []
    return [DIFFUSERS_WEIGHTS] if DIFFUSERS_WEIGHTS in names else []
