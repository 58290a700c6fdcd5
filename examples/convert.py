"""Writes a shipped LoRA for another program, and smaller: `python examples/convert.py`."""

from pathlib import Path

import prolora

FAMILY = Path(__file__).parent / "icon_family/weights"
lora = FAMILY / "loras/neon.safetensors"

# The base tells its names from those of other families, and is needed for DoRA.
small = prolora.convert(
    lora, FAMILY / "source", out="small.safetensors", format="comfy", out_rank=4
)
print(small.report)
print(f"{lora.stat().st_size} bytes became {Path('small.safetensors').stat().st_size}")
