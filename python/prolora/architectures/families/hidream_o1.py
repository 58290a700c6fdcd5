"""HiDream-O1: the language and vision model Qwen3-VL that paints in pixels, without a VAE.

The names are ComfyUI's; the authors' checkpoints have `model.` before every one, and so have
musubi-tuner's LoRAs. The authors never run `deepstack_merger_list`, and ComfyUI's files lack it.
"""

from ..family import COMFY, DIFFUSERS, PEFT, Family, Spelling

FAMILY = Family(
    id="hidream-o1",
    title="HiDream-O1",
    layouts=("hidream-o1",),
    spellings={
        "comfy": COMFY,
        "kohya": Spelling("lora_unet_model_", "diffusers", dotted=False),
        "diffusers": DIFFUSERS,
        "peft": PEFT,
    },
    claims={
        "hidream_o1": "HiDream-O1",  # ai-toolkit, musubi-tuner
        "hidream-o1": "HiDream-O1",  # musubi-tuner
    },
)
