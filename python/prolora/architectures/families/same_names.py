"""Transformers whose modules have diffusers' names in all files."""

from ..family import COMFY, DIFFUSERS, KOHYA, PEFT, Family, Spelling

_DIFFUSERS_ALONE = {"diffusers": DIFFUSERS, "peft": PEFT}

FAMILIES = (
    # OmniGen2's blocks, and before them blocks of two streams
    Family(
        "boogu-image",
        "Boogu-Image",
        ("boogu-image",),
        claims={"boogu_image": "Boogu-Image"},  # ai-toolkit
    ),
    # As FLUX.1, but every block reads another layer of the text encoder
    Family("bria-fibo", "Bria FIBO", ("bria-fibo",), spellings=_DIFFUSERS_ALONE),
    Family("cogview4", "CogView4", ("cogview4",), spellings=_DIFFUSERS_ALONE),
    Family(
        "ernie-image",
        "ERNIE-Image",
        ("ernie-image",),
        claims={"ernie": "ERNIE-Image"},  # OneTrainer; ai-toolkit writes "ernie_image"
    ),
    # I1 (Full, Dev, Fast) and E1: the feed-forward is a mixture of four experts
    Family(
        "hidream",
        "HiDream",
        ("hidream-i1",),
        claims={
            "hidream_i1": "HiDream-I1",  # ai-toolkit
            "hidream-i1": "HiDream-I1",  # OneTrainer
        },
    ),
    # The language and vision model Qwen3-VL that paints in pixels, without a VAE. The names are
    # ComfyUI's; the authors' checkpoints and musubi-tuner's LoRAs have `model.` before every one.
    # The authors never run `deepstack_merger_list`, and ComfyUI's files lack it.
    Family(
        "hidream-o1",
        "HiDream-O1",
        ("hidream-o1",),
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
    ),
    Family(
        "kandinsky5",
        "Kandinsky 5",
        (
            "kandinsky5-lite",
            "kandinsky5-pro",
            "kandinsky5-image-lite",
            "kandinsky5-image-lite-edit",
        ),
        claims={
            "kandinsky5": "Kandinsky 5",
            "kandinsky-5": "Kandinsky 5",
        },  # musubi-tuner writes both
    ),
    # Z-Image's blocks, trained from nothing, and a stream of semantic features
    Family(
        "llada-image",
        "LLaDA-Image",
        ("llada-image",),
        spellings={"comfy": COMFY, "kohya": KOHYA},
        rarer_than="z-image",
    ),
    # Qwen-Image's blocks, twelve of them, on latents that are not packed; withdrawn by its authors
    Family(
        "mageflow",
        "Mage-Flow",
        ("mageflow",),
        rarer_than="qwen-image",
        claims={"mageflow": "Mage-Flow"},  # ai-toolkit
    ),
    # Lumina 2's blocks, wider and more of them, and a second stack for images to edit
    Family("omnigen2", "OmniGen2", ("omnigen2",), claims={"omnigen2": "OmniGen2"}),  # ai-toolkit
    # Edit, 2509, 2511, 2512, Layered and the Lightning students, too
    Family(
        "qwen-image",
        "Qwen-Image",
        ("qwen-image",),
        claims={
            "qwen_image": "Qwen-Image",  # ai-toolkit, musubi-tuner
            "qwen-image": "Qwen-Image",  # musubi-tuner, OneTrainer
        },
    ),
    Family(
        "sana",
        "Sana",
        ("sana-0.6b", "sana-1.6b", "sana-4.8b", "sana-sprint-0.6b", "sana-sprint-1.6b"),
        spellings=_DIFFUSERS_ALONE,
        claims={"sana": "Sana"},  # OneTrainer
    ),
)
