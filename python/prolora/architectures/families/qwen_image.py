"""Qwen-Image: Edit, 2509, 2511, 2512, Layered, and its Lightning students.

ComfyUI and the trainers call the modules what diffusers calls them.
"""

from ..family import Family, Spelling

FAMILY = Family(
    id="qwen-image",
    title="Qwen-Image",
    layouts=("qwen-image",),
    also_read={
        Spelling("", "diffusers"): ("ComfyUI", "InvokeAI"),
        Spelling("lycoris_", "diffusers", dotted=False): ("ComfyUI",),
    },
    readers={
        "ComfyUI": ("comfy", "kohya", "diffusers"),
        "diffusers": ("diffusers", "comfy", "kohya"),
        "InvokeAI": ("diffusers", "kohya"),
        "musubi": ("kohya",),
    },
    claims={
        "qwen_image": "Qwen-Image",  # ai-toolkit, musubi-tuner
        "qwen-image": "Qwen-Image",  # musubi-tuner, OneTrainer
    },
    siblings=("Qwen-Image, Edit, Edit 2509, Edit 2511, 2512, and their Lightning students",),
)
