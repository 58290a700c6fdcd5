"""Fits a shipped LoRA to a model that was trained apart: `python examples/fit.py`."""

from pathlib import Path

import prolora

FAMILY = Path(__file__).parent / "icon_family/weights"
lora = FAMILY / "loras/neon.safetensors"
prompts = tuple((FAMILY / "prompts.txt").read_text().splitlines())
# Few images and steps, so that it takes seconds; `prolora demo` takes more.
few = {"images": 4, "steps": 4, "fit_steps": 4, "batch": 8, "force": True}

bases = FAMILY / "source", FAMILY / "apart"
fitted = prolora.fit(lora, *bases, out="fitted.safetensors", prompts=prompts, **few)
print(fitted.report)
