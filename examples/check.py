"""Says what a shipped LoRA is, and where it may move: `python examples/check.py`."""

from pathlib import Path

import prolora

FAMILY = Path(__file__).parent / "icon_family/weights"
lora = FAMILY / "loras/neon.safetensors"

for title, value in prolora.check(lora).facts():
    print(f"{title}: {value}")
for base in (FAMILY / "source", "sdxl"):
    fits = prolora.check(lora, base=base)  # or the name of a family
    print(bool(fits), fits.headline)
print(prolora.check(lora, source=FAMILY / "source", target=FAMILY / "far").headline)
