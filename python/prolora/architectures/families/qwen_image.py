"""Qwen-Image: Edit, 2509, 2511, 2512, Layered, and its Lightning students.

ComfyUI and the trainers call the modules what diffusers calls them.
"""

from ..family import Family

FAMILY = Family(
    id="qwen-image",
    title="Qwen-Image",
    layouts=("qwen-image",),
    claims={
        "qwen_image": "Qwen-Image",  # ai-toolkit, musubi-tuner
        "qwen-image": "Qwen-Image",  # musubi-tuner, OneTrainer
    },
)
