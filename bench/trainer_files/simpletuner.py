"""SimpleTuner: PEFT on each model's class, with the targets and the pipeline of the model.

The settings are the defaults: a standard LoRA without text encoders. Each model is written as
`lora_format: diffusers`, the default, and as `comfyui`, unless both are the same. The wrapper of a
model has its classes and the names of the layers to train; its `save_lora_weights` writes the file.
LyCORIS networks are in lycoris.py.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loader_programs.common import enter
from torch import Tensor, nn

from . import RANK, Cell, find_fields

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))

from published_models import PUBLISHED
from published_others import OTHERS
from published_unets import UNETS
from published_videos import VIDEOS

CONFIGS = {id_: model.config for id_, model in {**PUBLISHED, **VIDEOS, **UNETS, **OTHERS}.items()}
EMPTY = (
    "torchvision optimum albumentations torchao torchaudio cv2 lpips k_diffusion open_clip timm "
    "lycoris prodigyopt bitsandbytes omegaconf einops ftfy av imageio soundfile scipy kornia "
    "sentencepiece wandb dotenv gguf librosa matplotlib boto3 botocore pandas colorama fastapi "
    "uvicorn sse_starlette ramtorch peft_singlora trainingsample pydantic pydantic_core starlette "
    "toml datasets pyarrow singlora nest_asyncio fal_client beautifulsoup4 bs4 lxml yaml torchsde "
    "cryptography prompt_toolkit sageattention deepspeed psutil py3langid loguru pypinyin "
    "num2words hangul_romanize pykakasi"
)

MODELS: tuple[tuple[str, str, str, str], ...] = (
    ("sd1x", "StableDiffusion1", "sd15", "sd15"),
    ("sdxl", "SDXL", "sdxl", "sdxl"),
    ("sd3", "SD3", "sd3", "sd3-medium"),
    ("sd3", "SD3", "sd3", "sd3.5-large"),
    ("kolors", "Kolors", "", ""),
    ("flux", "Flux", "flux", "flux1-dev"),
    ("flux2", "Flux2", "flux2", "flux2-dev"),
    ("flux2", "Flux2", "flux2", "flux2-klein-9b"),
    ("flux2", "Flux2", "flux2", "flux2-klein-4b"),
    ("chroma", "Chroma", "chroma", "chroma"),
    ("auraflow", "Auraflow", "auraflow", "auraflow"),
    ("pixart", "PixartSigma", "pixart", "pixart-sigma"),
    ("lumina2", "Lumina2", "lumina2", "lumina2"),
    ("z_image", "ZImage", "z-image", "z-image"),
    ("z_image_omni", "ZImageOmni", "", ""),
    ("qwen_image", "QwenImage", "qwen-image", "qwen-image"),
    ("hidream", "HiDream", "hidream", "hidream-i1"),
    ("krea2", "Krea2", "krea2", "krea2"),
    ("ideogram", "Ideogram4", "ideogram4", "ideogram4"),
    ("ernie", "Ernie", "ernie-image", "ernie-image"),
    ("boogu_image", "BooguImage", "", ""),
    ("longcat_image", "LongCatImage", "longcat-image", "longcat-image"),
    ("mageflow", "MageFlow", "mageflow", "mageflow"),
    ("kandinsky5_image", "Kandinsky5Image", "kandinsky5", "kandinsky5-image-lite"),
    ("kandinsky5_video", "Kandinsky5Video", "kandinsky5", "kandinsky5-lite"),
    ("kandinsky5_video", "Kandinsky5Video", "kandinsky5", "kandinsky5-pro"),
    ("sana", "Sana", "sana", "sana-1.6b"),
    ("cosmos", "Cosmos2Image", "cosmos", "cosmos-predict2-2b"),
    ("anima", "Anima", "cosmos", "anima"),
    ("wan", "Wan", "wan", "wan-t2v-1.3b"),
    ("wan", "Wan", "wan", "wan-t2v-14b"),
    ("wan", "Wan", "wan", "wan2.1-i2v-14b"),
    ("wan", "Wan", "wan", "wan2.2-i2v-14b"),
    ("wan", "Wan", "wan", "wan2.2-ti2v-5b"),
    ("ltxvideo", "LTXVideo", "ltxv", "ltxv-2b"),
    ("ltxvideo2", "LTXVideo2", "ltx2", "ltx2"),
    ("ltxvideo2", "LTXVideo2", "ltx2", "ltx2.3"),
    ("hunyuanvideo", "HunyuanVideo", "hunyuan-video-1.5", "hunyuan-video-1.5"),
    ("minimaxh3", "MiniMaxH3", "minimax-h3", "minimax-h3"),
    ("ace_step", "ACEStep", "", ""),
    ("stable_cascade", "StableCascadeStageC", "", ""),
    ("deepfloyd", "DeepFloydIF", "", ""),
    ("omnigen", "OmniGen", "", ""),
    ("sanavideo", "SanaVideo", "", ""),
    ("cosmos3", "Cosmos3Omni", "", ""),
    ("longcat_video", "LongCatVideo", "", ""),
    ("wan_s2v", "WanS2V", "", ""),
    ("infinitetalk", "InfiniteTalk", "", ""),
    ("heartmula", "HeartMuLa", "", ""),
    ("minimaxmusic", "MiniMaxMusic", "", ""),
    ("zlab_i1", "ZLabI1", "", ""),
)
"""The folder of the model, its class, and family and layout in prolora."""


def list_cells(checkout: Path) -> Iterator[Cell]:
    enter(checkout, *EMPTY.split())
    for model in MODELS:
        yield from make_cells(*model)


def make_cells(folder: str, name: str, family: str, layout: str) -> Iterator[Cell]:
    fields = {"model": f"{folder} {layout}".strip(), "family": family, "layout": layout}
    written: dict[str, Tensor] = {}
    for form in ("diffusers", "comfyui"):
        try:
            module = importlib.import_module(f"simpletuner.helpers.models.{folder}.model")
            wrapper = make_wrapper(getattr(module, name), form)
            base = build_base(wrapper.MODEL_CLASS, layout)
            saved = save(wrapper, add_lora(wrapper, base))
            found = find_fields(saved)
        except Exception as error:  # the trainer's own code, of fifty models
            note = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            yield Cell(**fields, how="not obtainable", note=note)
            return
        if written.keys() == saved.keys():  # the option has no effect on this model
            return
        written = saved
        own = fields | {"model": f"{fields['model']}, {form}"}
        note = f"LoraConfig on {type(base).__name__} of {type(base).__module__.partition('.')[0]}"
        yield Cell(**own, how="network class", note=note, **found)


def make_wrapper(cls: Any, form: str) -> Any:
    """Makes the wrapper without its __init__, which would need all settings of a run."""
    wrapper = cls.__new__(cls)
    wrapper.config = Namespace(
        lora_type="standard",
        model_type="lora",
        controlnet=False,
        control=False,
        flux_lora_target="all",
        lora_format=form,
        peft_lora_target_modules=None,
        model_flavour=None,
    )
    return wrapper


def build_base(cls: type[nn.Module], layout: str) -> nn.Module:
    """Makes the base in its published size, or as its class does if prolora has no size of it."""
    with torch.device("meta"):
        if layout == "ideogram4":  # MODEL_CLASS is a placeholder until a checkpoint is opened
            module = importlib.import_module("simpletuner.helpers.models.ideogram.transformer")
            return module.Ideogram4Transformer(module.Ideogram4Config())  # type: ignore[no-any-return]
        if hasattr(cls, "from_config"):
            return cls.from_config(dict(CONFIGS.get(layout, {})))
        return cls()


def add_lora(wrapper: Any, base: nn.Module) -> dict[str, Tensor]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        init_lora_weights="gaussian",
        target_modules=wrapper.get_lora_target_layers(),
        exclude_modules=wrapper.DEFAULT_LORA_EXCLUDE_TARGETS,
    )
    with torch.device("meta"):
        inject_adapter_in_model(config, base)
    base.peft_config = {"default": config}
    return get_peft_model_state_dict(base)  # type: ignore[no-any-return]


def save(wrapper: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs `save_lora_weights` of a model; returns what it gives to safetensors."""
    kind = wrapper.MODEL_TYPE.value
    files: list[dict[str, Tensor]] = []

    def keep(tensors: dict[str, Tensor], *_: object, **__: object) -> None:
        files.append(dict(tensors))

    with (
        tempfile.TemporaryDirectory() as folder,
        patch("safetensors.torch.save_file", keep),
    ):
        wrapper.save_lora_weights(
            folder,
            **{
                f"{kind}_lora_layers": state,
                f"{kind}_lora_adapter_metadata": {"lora_alpha": RANK, "r": RANK},
            },
        )
    return files[0]
