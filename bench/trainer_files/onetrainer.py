"""OneTrainer: its setup of a LoRA on its models, and its writer of files.

There is a cell for every format of files that a model can be saved in, without text encoders and
with all that can be trained. Of inpainting and depth models there is only KOHYA_LORA, the format of
their presets: but for the first layer they are as the others. STABLE_DIFFUSION_20_BASE and 21_BASE
have the files of 20 and 21. All layers are trained, which is the default; the presets that come
with it train fewer (`layer_filter`) under the same names. Backups have the names of LEGACY_LORA of
models that are written unconverted (`transformer.….lora_down.weight`).

It needs the package parse, which converts names. It trains convolutions of two dimensions. LoHa,
LoKr, OFT and DoRA are not here: a `Cell` cannot represent them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from loader_programs.common import enter
from loader_programs.text_encoders import CLIP, build_encoder
from safetensors import safe_open
from torch import nn

from prolora.architectures.families import known_families

from . import Cell
from .musubi_tuner import LORA, PEFT, find_modules

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))

from make_layouts import build_model
from published_models import PUBLISHED
from published_others import OTHERS
from published_unets import UNETS
from published_videos import VIDEOS

SUFFIXES = {
    "DIFFUSERS_LORA": PEFT,
    "KOHYA_LORA": LORA,
    "ORIGINAL_LORA": (*PEFT, ".alpha"),
    "COMFY_LORA": (*PEFT, ".alpha"),
    "LEGACY_LORA": LORA,
}
HEADER = ("modelspec.architecture", "modelspec.implementation", "modelspec.title")
HEADER += ("ss_base_model_version", "ss_v2")


@dataclass(frozen=True)
class Model:
    """A model of OneTrainer.

    Attributes:
        type: its `ModelType`.
        cls: its class in modules/model.
        size: the id in prolora of a published size, or a function that builds the model.
        encoders: the text encoders that can be trained.
        variant: which of the sizes of the type.
        changes: of the size's configuration; prolora has no layout of such a model.
    """

    type: str
    cls: str
    size: str | Callable[[Path], nn.Module]
    encoders: tuple[str, ...] = ()
    variant: str = ""
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.type} {self.variant}".strip()


def build_wuerstchen(checkout: Path) -> nn.Module:
    """The prior, with the sizes in diffusers, scripts/convert_wuerstchen.py."""
    prior = importlib.import_module("modules.model.WuerstchenModel").WuerstchenPrior
    return prior(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24)


def build_cascade(billions: str) -> Callable[[Path], nn.Module]:
    def build(checkout: Path) -> nn.Module:
        from diffusers.models import StableCascadeUNet

        file = f"resources/model_config/stable_cascade/stable_cascade_prior_{billions}b.json"
        return StableCascadeUNet.from_config(json.loads((checkout / file).read_text("utf-8")))

    return build


CLIP_T5 = ("clip-l", "t5-xxl")
SDXL = ("clip-l", "clip-bigg projected")
SD3 = ("clip-l projected", "clip-bigg projected", "t5-xxl")
INPAINTING, DEPTH = {"in_channels": 9}, {"in_channels": 5}
MODELS = (
    Model("STABLE_DIFFUSION_15", "StableDiffusion", "sd15", ("clip-l",)),
    Model("STABLE_DIFFUSION_20", "StableDiffusion", "sd21", ("clip-h",)),
    Model("STABLE_DIFFUSION_21", "StableDiffusion", "sd21", ("clip-h",)),
    Model("STABLE_DIFFUSION_XL_10_BASE", "StableDiffusionXL", "sdxl", SDXL),
    Model("STABLE_DIFFUSION_3", "StableDiffusion3", "sd3-medium", SD3),
    Model("STABLE_DIFFUSION_35", "StableDiffusion3", "sd3.5-medium", SD3, "medium"),
    Model("STABLE_DIFFUSION_35", "StableDiffusion3", "sd3.5-large", SD3, "large"),
    Model("PIXART_ALPHA", "PixArtAlpha", "pixart-alpha", ("t5-xxl",)),
    Model("PIXART_SIGMA", "PixArtAlpha", "pixart-sigma", ("t5-xxl",)),
    Model("FLUX_DEV_1", "Flux", "flux1-dev", CLIP_T5),
    Model("FLUX_DEV_1", "Flux", "flux1-schnell", CLIP_T5, "schnell"),
    Model("FLUX_FILL_DEV_1", "Flux", "flux1-fill", CLIP_T5),
    Model("FLUX_2", "Flux2", "flux2-dev", variant="dev"),
    Model("FLUX_2", "Flux2", "flux2-klein-9b", variant="klein 9B"),
    Model("FLUX_2", "Flux2", "flux2-klein-4b", variant="klein 4B"),
    Model("CHROMA_1", "Chroma", "chroma", ("t5-xxl",)),
    Model("QWEN", "Qwen", "qwen-image", ("qwen2.5-vl-7b",)),
    Model("ANIMA", "Anima", "anima"),
    Model("KREA_2", "Krea2", "krea2"),
    Model("Z_IMAGE", "ZImage", "z-image"),
    Model("ERNIE", "Ernie", "ernie-image"),
    Model("IDEOGRAM_4", "Ideogram", "ideogram4"),
    Model("SANA", "Sana", "sana-1.6b", ("gemma2-2b",), "1.6B"),
    Model("SANA", "Sana", "sana-0.6b", ("gemma2-2b",), "0.6B"),
    Model("SANA", "Sana", "sana-4.8b", ("gemma2-2b",), "4.8B"),
    Model("HUNYUAN_VIDEO", "HunyuanVideo", "hunyuan-video", ("llama3-8b", "clip-l")),
    Model("HI_DREAM_FULL", "HiDream", "hidream-i1", (*SD3, "llama3.1-8b with head")),
    Model(
        "STABLE_DIFFUSION_15_INPAINTING",
        "StableDiffusion",
        "sd15",
        ("clip-l",),
        changes=INPAINTING,
    ),
    Model(
        "STABLE_DIFFUSION_20_INPAINTING",
        "StableDiffusion",
        "sd21",
        ("clip-h",),
        changes=INPAINTING,
    ),
    Model("STABLE_DIFFUSION_20_DEPTH", "StableDiffusion", "sd21", ("clip-h",), changes=DEPTH),
    Model(
        "STABLE_DIFFUSION_XL_10_BASE_INPAINTING",
        "StableDiffusionXL",
        "sdxl",
        SDXL,
        changes=INPAINTING,
    ),
    Model("WUERSTCHEN_2", "Wuerstchen", build_wuerstchen, ("clip-bigg",)),
    Model(
        "STABLE_CASCADE_1",
        "Wuerstchen",
        build_cascade("3.6"),
        ("clip-bigg projected",),
        "3.6B",
    ),
    Model(
        "STABLE_CASCADE_1",
        "Wuerstchen",
        build_cascade("1.0"),
        ("clip-bigg projected",),
        "1.0B",
    ),
)


class LoraIsSetUp(Exception):
    """Ends `setup_model` where it begins to make the optimizer."""


def list_cells(checkout: Path) -> Iterator[Cell]:
    enter(checkout, "torchvision", "cv2", "omegaconf")
    # `create` imports everything that training needs: data loaders, optimizers, samplers.
    unneeded = ("modules.util.create", "torch.utils.tensorboard")
    with (
        contextlib.chdir(checkout),
        patch.dict(sys.modules, {name: MagicMock() for name in unneeded}),
    ):
        for part in ("modelLoader", "modelSaver", "modelSetup"):
            find("util.factory").import_dir(f"modules/{part}", f"modules.{part}")
        for model in MODELS:
            type_ = find("util.enum.ModelType").ModelType[model.type]
            for format_ in type_.supported_lora_formats():
                if model.changes and str(format_) != "KOHYA_LORA":
                    continue
                yield make_cell(replace(model, encoders=()), format_, checkout)
                if model.encoders and not is_refused(model, str(format_)):
                    yield make_cell(model, format_, checkout)


def is_refused(model: Model, format_: str) -> bool:
    """Whether the trainer does not save text encoders in a format."""
    unknown_to_comfyui = model.cls in ("Sana", "Wuerstchen")
    return format_ == "ORIGINAL_LORA" or (format_ == "COMFY_LORA" and unknown_to_comfyui)


def find(module: str) -> Any:
    return importlib.import_module(f"modules.{module}")


def make_cell(model: Model, format_: Any, checkout: Path) -> Cell:
    """Sets a LoRA up, writes it and reads the file, all but the last as the trainer does."""
    with torch.device("meta"):
        loaded = load_model(model, checkout)
    set_up(loaded, format_, bool(model.encoders))
    denoiser = getattr(loaded, name_parts(loaded)[0])
    names = [type(denoiser).__name__, *model.encoders]
    built = isinstance(model.size, str)
    cell = Cell(
        model=f"{model.name}, {format_}" + (" with text encoders" if model.encoders else ""),
        family=find_family(model.size) if built else "",
        layout=model.size if built and not model.changes else "",
        how="network class",
        note=f"{model.cls}LoRASetup on {' and '.join(names)}, {model.cls}LoRASaver",
        suffixes=SUFFIXES[str(format_)],
    )
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "lora.safetensors"))
        saver = get("modelSaver.BaseModelSaver", loaded.model_type)
        saver.save(loaded, loaded.model_type, format_, file, torch.bfloat16)
        with safe_open(file, framework="pt") as written:
            header = written.metadata()
            state = {key: written.get_tensor(key) for key in written.keys()}
    return replace(
        cell,
        modules=find_modules(state, cell.suffixes),
        metadata={key: header[key] for key in HEADER if key in header},
    )


def find_family(layout: str) -> str:
    return next(id_ for id_, family in known_families().items() if layout in family.layouts)


def get(base: str, type_: Any, *arguments: object) -> Any:
    """Makes the trainer's loader, setup or saver of a model's LoRA."""
    method = find("util.enum.TrainingMethod").TrainingMethod.LORA
    cls = find("util.factory").get(getattr(find(base), base.split(".")[1]), type_, method)
    return cls(*arguments)


def name_parts(loaded: Any) -> list[str]:
    """The attributes of the trainer's model: the denoiser and the text encoders."""
    parts = [loaded.model_type.denoising_model_part(), *loaded.model_type.text_encoder_parts()]
    if loaded.model_type.is_wuerstchen():
        return [f"prior_{part}" for part in parts]
    return [f"{part}_1" if hasattr(loaded, f"{part}_1") else part for part in parts]


def load_model(model: Model, checkout: Path) -> Any:
    """Makes the trainer's model of modules without weights."""
    type_ = find("util.enum.ModelType").ModelType[model.type]
    loaded = getattr(find(f"model.{model.cls}Model"), f"{model.cls}Model")(type_)
    loaded.model_spec = get("modelLoader.BaseModelLoader", type_)._load_default_model_spec(type_)
    if isinstance(model.size, str):
        published = {**PUBLISHED, **VIDEOS, **OTHERS, **UNETS}[model.size]
        # Anima's adapter of text is another model here, which is not trained.
        denoiser = build_model(replace(published, attached={}), **model.changes)
    else:
        denoiser = model.size(checkout)
    parts = [denoiser, *map(build_text_encoder, model.encoders)]
    for name, part in zip(name_parts(loaded), parts, strict=False):
        setattr(loaded, name, part)
    return loaded


def build_text_encoder(name: str) -> nn.Module:
    """An encoder of the class that the trainer loads."""
    import transformers

    if name in CLIP or name == "t5-xxl":
        return build_encoder(name)
    if name.endswith(" projected"):
        width, layers = CLIP[name.removesuffix(" projected")]
        return transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                projection_dim=width,
            )
        )
    if name == "gemma2-2b":
        return transformers.Gemma2Model(transformers.Gemma2Config())
    if name == "qwen2.5-vl-7b":
        text = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
        text |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config={"hidden_size": 1280, "out_hidden_size": 3584}
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    llama = transformers.LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
    )
    head = name.endswith(" with head")
    return (transformers.LlamaForCausalLM if head else transformers.LlamaModel)(llama)


def set_up(model: Any, format_: Any, encoders: bool) -> None:
    """Runs `setup_model` up to the optimizer, then gives the factors memory."""
    config = find("util.config.TrainConfig").TrainConfig.default_values()
    config.model_type, config.output_model_format, config.lora_rank = model.model_type, format_, 1
    for part in model.model_type.text_encoder_parts():
        getattr(config, part).train = encoders
    model.train_config = config
    setup = get("modelSetup.BaseModelSetup", model.model_type, "cpu", "cpu", False)
    # Embeddings need tokenizers; none are trained.
    setup._setup_embeddings = setup._setup_embedding_wrapper = lambda *_: None
    setup.create_parameters = MagicMock(side_effect=LoraIsSetUp)
    with contextlib.suppress(LoraIsSetUp), contextlib.redirect_stdout(None):
        setup.setup_model(model, config)
    for wrapper in model.adapters():
        for module in wrapper.modules():
            module.to_empty(device="cpu")
