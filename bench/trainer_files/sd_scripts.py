"""sd-scripts: its networks on its models, and its converters of finished files.

Text encoders are trained unless `--network_train_unet_only` is given. There is a cell of each
case. T5 is trained only with `--network_args train_t5xxl=True`; the cells with text encoders have
it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from loader_programs import sd_scripts
from loader_programs.common import enter
from loader_programs.text_encoders import build_encoder
from torch import nn

from . import Cell
from .musubi_tuner import LORA, PEFT, Make, Module, convert, find_modules

COMFYUI = (*PEFT, ".alpha")


@dataclass(frozen=True)
class Model:
    """A model of sd-scripts.

    Attributes:
        networks: the file in networks/ that the documentation of the model names.
        version: `ss_base_model_version`.
        encoders: the text encoders that can be trained.
        spec: what the training script passes to `sai_model_spec`: {"flux": "dev"}.
        options: arguments of `determine_architecture` that are not False.
        arguments: of `create_network`, when the text encoders are trained.
    """

    name: str
    family: str
    layout: str
    networks: str
    build: Make
    version: str
    encoders: tuple[str, ...] = ()
    spec: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)


def find_build(layout: str) -> Make:
    return sd_scripts.MODELS[layout][1]


def build_schnell(module: Module) -> nn.Module:
    models = module("flux_models")
    return models.Flux(models.configs["schnell"].params)


def build_sd35_large(module: Module) -> nn.Module:
    return sd_scripts.build_sd3(module, 38, qk_norm="rms", model_type="5-large")


T5 = {"train_t5xxl": "True"}
SD3 = ("clip-l", "clip-bigg", "t5-xxl")
MODELS = (
    Model("SD 1.5", "sd15", "sd15", "lora", find_build("sd15"), "sd_v1", ("clip-l",)),
    Model(
        "SD 2.1 768 v",
        "sd21",
        "sd21",
        "lora",
        find_build("sd21"),
        "sd_v2_v",
        ("clip-h",),
        options=("v2", "v_parameterization"),
    ),
    Model(
        "SDXL",
        "sdxl",
        "sdxl",
        "lora",
        find_build("sdxl"),
        "sdxl_base_v1-0",
        ("clip-l", "clip-bigg"),
        options=("sdxl",),
    ),
    Model(
        "FLUX.1 dev",
        "flux",
        "flux1-dev",
        "lora_flux",
        find_build("flux1-dev"),
        "flux1",
        ("clip-l", "t5-xxl"),
        {"flux": "dev"},
        arguments=T5,
    ),
    Model(
        "FLUX.1 schnell",
        "flux",
        "flux1-schnell",
        "lora_flux",
        build_schnell,
        "flux1",
        ("clip-l", "t5-xxl"),
        {"flux": "schnell"},
        arguments=T5,
    ),
    Model(
        "Chroma",
        "chroma",
        "chroma",
        "lora_flux",
        find_build("chroma"),
        "chroma",
        ("dummy", "t5-xxl"),
        {"flux": "chroma"},
        arguments=T5,
    ),
    Model(
        "SD3 medium",
        "sd3",
        "sd3-medium",
        "lora_sd3",
        find_build("sd3-medium"),
        "medium",
        SD3,
        {"sd3": "medium"},
        arguments=T5,
    ),
    Model(
        "SD3.5 medium",
        "sd3",
        "sd3.5-medium",
        "lora_sd3",
        find_build("sd3.5-medium"),
        "5-medium",
        SD3,
        {"sd3": "5-medium"},
        arguments=T5,
    ),
    Model(
        "SD3.5 large",
        "sd3",
        "sd3.5-large",
        "lora_sd3",
        build_sd35_large,
        "5-large",
        SD3,
        {"sd3": "5-large"},
        arguments=T5,
    ),
    Model(
        "Lumina 2",
        "lumina2",
        "lumina2",
        "lora_lumina",
        find_build("lumina2"),
        "lumina2",
        ("gemma-2-2b",),
        {"lumina": "lumina2"},
    ),
    Model(
        "HunyuanImage 2.1",
        "hunyuan-image",
        "hunyuan-image",
        "lora_hunyuan_image",
        find_build("hunyuan-image"),
        "hunyuan-image-2.1",
        spec={"hunyuan_image": "2.1"},
    ),
    Model(
        "Anima",
        "cosmos",
        "anima",
        "lora_anima",
        find_build("anima"),
        "anima",
        ("qwen3-0.6b",),
        {"anima": "preview"},
    ),
)

CONVERTED = {
    "Anima": ("convert_anima_lora_to_comfy", COMFYUI),
    "HunyuanImage 2.1": ("convert_hunyuan_image_lora_to_comfy", LORA),
}
"""Model -> the script for ComfyUI that the documentation of the model names, its suffixes."""


def list_cells(checkout: Path) -> Iterator[Cell]:
    enter(checkout, "cv2", "imagesize", "toml", "voluptuous", "torchvision", "sentencepiece")
    for model in MODELS:
        cells = [make_cell(model, checkout, trained=False)]
        if model.encoders:
            cells.append(make_cell(model, checkout, trained=True))
        yield from cells
        if model.name in CONVERTED:
            yield convert_cell(cells[-1], *CONVERTED[model.name])


def convert_cell(cell: Cell, script: str, suffixes: tuple[str, ...]) -> Cell:
    """Runs a converter, of which train_util needs an older transformers and makes only hashes."""
    hashes = ModuleType("library.train_util")
    hashes.precalculate_safetensors_hashes = lambda *_: ("", "")
    library = importlib.import_module("library")
    with (
        patch.dict(sys.modules, {"library.train_util": hashes}),
        patch.object(library, "train_util", hashes, create=True),
    ):
        main = importlib.import_module(f"networks.{script}").main
        return convert(cell, main, suffixes, f"{script}.py")


def make_cell(model: Model, checkout: Path, trained: bool) -> Cell:
    """Makes the network as train_network.py does, with the text encoders trained or not."""
    networks = importlib.import_module(f"networks.{model.networks}")
    with torch.device("meta"):
        base = model.build(lambda name: importlib.import_module(f"library.{name}"))
        encoders = [build_text_encoder(name, checkout) for name in model.encoders]
        # Stable Diffusion 1 and 2 have one encoder and no list; other networks want a list.
        texts = encoders[0] if model.networks == "lora" and len(encoders) == 1 else encoders
        if model.networks == "lora_hunyuan_image":
            texts = [nn.Module(), nn.Module()]
        arguments = model.arguments if trained else {}
        network = networks.create_network(1.0, 4, 4.0, None, texts, base, **arguments)
        network.apply_to(texts, base, trained, True)
    names = f"networks.{model.networks} on {type(base).__name__}"
    if trained:
        names += f" and {', '.join(model.encoders)}"
    return Cell(
        model=f"{model.name} with text encoders" if trained else model.name,
        family=model.family,
        layout=model.layout,
        how="network class",
        note=names,
        modules=find_modules(network.state_dict(), LORA),
        metadata=describe(model),
    )


def build_text_encoder(name: str, checkout: Path) -> nn.Module:
    """Builds an encoder as the loaders of sd-scripts do, with the same outer names."""
    if name == "dummy":
        return importlib.import_module("library.flux_utils").dummy_clip_l()
    if name == "gemma-2-2b":
        load = importlib.import_module("library.lumina_util").load_gemma2
        return load(None, torch.float32, "meta", state_dict={})
    if name == "qwen3-0.6b":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        folder = checkout / "configs/qwen3_06b"
        return Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder, local_files_only=True)).model
    return build_encoder(name)


def describe(model: Model) -> dict[str, str]:
    """Returns what the header says about the model."""
    names = importlib.import_module("library.sai_model_spec")
    v2, v_parameterization, sdxl = (
        option in model.options for option in ("v2", "v_parameterization", "sdxl")
    )
    architecture = names.determine_architecture(
        v2, v_parameterization, sdxl, True, False, model.spec
    )
    return {
        "ss_base_model_version": model.version,
        "ss_network_module": f"networks.{model.networks}",
        "ss_v2": str(v2),
        "modelspec.architecture": architecture,
        "modelspec.implementation": names.determine_implementation(True, False, sdxl, model.spec),
    }
