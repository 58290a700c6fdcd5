"""Moves a shipped LoRA to a model without some of its blocks: `python examples/transfer.py`."""

from pathlib import Path

import prolora

FAMILY = Path(__file__).parent / "icon_family/weights"
lora = FAMILY / "loras/neon.safetensors"

moved = prolora.transfer(lora, FAMILY / "source", FAMILY / "pruned", out="moved.safetensors")
print(moved.report)
