"""SD.Next: its own readers, and diffusers' for the models that it leaves to `load_lora_weights`."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape

from . import diffusers
from .common import Keys, Open, Read, enter, keeps_rows, take_modules

# Family -> its type there, for what it reads itself (`lora_overrides.allow_native`).
TYPES = {
    **dict.fromkeys(("sd15", "sd21", "bk-sdm"), "sd"),
    **dict.fromkeys(("sdxl", "ssd-1b", "segmind-vega", "koala"), "sdxl"),
    **{name: name for name in ("sd3", "chroma", "krea2")},
    **{"flux": "f1", "flux2": "f2", "z-image": "zimage", "cosmos": "anima"},
    "ernie-image": "ernieimage",
}
LEFT_TO_DIFFUSERS = (
    "auraflow bria-fibo cogview4 hidream kandinsky5 lumina2 qwen-image sana wan".split()
)
WITHOUT_LORAS = ("boogu-image", "hidream-o1", "longcat-image", "omnigen2", "pixart")
"""Families whose pipelines there have no `load_lora_weights`."""
STUBS = "devices errors files_cache hashes logger model_quant sd_checkpoint sd_models shared"


def build_layer(name: str, shape: tuple[int, ...], root: nn.Module) -> nn.Module:
    """A layer on the meta device, at its place in a tree of modules."""
    with torch.device("meta"):
        layer = nn.Conv2d(*shape[1::-1], shape[2:]) if len(shape) == 4 else None
        layer = layer or nn.Linear(*matrix_shape(shape)[::-1])
    *path, last = name.split(".")
    for word in path:
        root.add_module(word, getattr(root, word, None) or nn.Module())
        root = getattr(root, word)
    root.add_module(last, layer)
    return layer


def open_program(checkout: Path) -> Open:
    """`load_safetensors`, with modules instead of a model and tensors instead of a file."""
    enter(checkout, "einops", "installer")
    left = diffusers.open_program(checkout)
    for name in (*STUBS.split(), "sd_models_compile", "sd_models_utils"):
        sys.modules[f"modules.{name}"] = MagicMock()
    shared = sys.modules["modules.shared"]
    load = importlib.import_module("modules.lora.lora_load")
    native = importlib.import_module("modules.lora.native_adapter")
    load.os = native.os = MagicMock()

    def open_model(family: Family, layout: str) -> Read | None:
        if family.id in LEFT_TO_DIFFUSERS:
            return left(family, layout)
        if family.id in WITHOUT_LORAS:
            return lambda tensors, keys: set()
        if family.id not in TYPES or layout == "chroma-radiance" or "cosmos" in layout:
            return None
        shapes, root, names = load_layout(layout).shapes, nn.Module(), {}
        for name, shape in shapes.items():
            own = family.find_weight_holding(name).name if family.id == "krea2" else name
            names[id(build_layer(own, shape, root))] = name
        model = SimpleNamespace(**{"unet" if family.unet else "transformer": root})
        model.llm_adapter = root._modules.pop("llm_adapter", None)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            shared.sd_model, shared.sd_model_type, marks = model, TYPES[family.id], {}
            downs = [key for key in tensors if "lora_down" in key or "lora_A" in key]
            for i, key in enumerate(downs):  # a number each, known again at any power of two
                tensors[key] = tensors[key] * (1 + i / len(downs))
                marks[key] = math.frexp(float(tensors[key].flatten()[0]))[0]
            load.sd_models.read_state_dict = native.read_state_dict = lambda *_, **__: dict(tensors)
            load.lora_cache.clear()
            network = load.load_safetensors("x", MagicMock())
            found = set()
            for one in network.modules.values() if network else ():
                name = names.get(id(one.sd_module), "")
                if name in keys and hasattr(one, "up_model"):
                    up, down = one.up_model.weight, one.down_model.weight
                    mark = math.frexp(float(down.flatten()[0]))[0]
                    own = [marks[key] for key in keys[name] if key in marks]
                    fits = (len(up), down[0].numel()) == matrix_shape(shapes[name])
                    if fits and keeps_rows(up) and math.isclose(mark, own[0], rel_tol=1e-5):
                        found.add(name)
            return take_modules(found, keys)

        return read

    return open_model
