"""InvokeAI: the kinds of file that it recognises, its conversions, the modules that it patches."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout

from .common import Keys, Open, Read, enter, mark_pairs, name_weights
from .text_encoders import build_encoder

BASES = {
    "anima": ("Anima", "anima"),
    "flux1-dev": ("Flux", "flux"),
    "flux2-dev": ("Flux2", "flux"),
    "flux2-klein-9b": ("Flux2", "flux"),
    "krea2": ("Krea2", "krea2"),
    "qwen-image": ("QwenImage", "qwen_image"),
    "sd15": ("StableDiffusion1", ""),
    "sd21": ("StableDiffusion2", ""),
    "sdxl": ("StableDiffusionXL", ""),
    "wan2.2-i2v-14b": ("Wan", "wan"),
    "wan-t2v-14b": ("Wan", "wan"),
    "z-image": ("ZImage", "z_image"),
}
"""Layout -> (its base, the file with the prefixes of its layers)."""
BY_AUTHORS = ("anima", "flux1-dev")
"""Models of its own, which have the authors' names; all others are diffusers'."""
ENCODERS = {
    "sd15": {"lora_te_": "clip-l"},
    "sd21": {"lora_te_": "clip-h"},
    "sdxl": {"lora_te1_": "clip-l", "lora_te2_": "clip-bigg"},
    "flux1-dev": {"lora_clip-": "clip-l", "lora_t5-": "t5-xxl"},
}
"""Layout -> prefix of layers -> the encoder that they patch."""

MISSING = (
    "torchvision cv2 picklescan compel invisible_watermark onnx spandrel fastapi "
    "fastapi_events socketio uvicorn blake3 gguf mediapipe pypatchmatch "
    "dynamicprompts semver deprecated sentencepiece accelerate onnxruntime scipy "
    "skimage rapidfuzz humanize asyncer jinja2 "
).split()
"""Packages that it imports and this does not need."""


class _Tree(nn.Module):
    """Modules by their names, which hold nothing but the shape of a weight."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            place: nn.Module = self
            for word in name.split("."):
                if word not in place._modules:
                    place.add_module(word, nn.Module())
                place = place._modules[word]
            place.weight = torch.empty(shape, device="meta")


def open_program(checkout: Path) -> Open:
    """The first configuration that takes the file, `LoRALoader._load_model`, `_get_submodule`."""
    enter(checkout, *MISSING)
    base_type = importlib.import_module("invokeai.backend.model_manager.taxonomy").BaseModelType
    configs = importlib.import_module("invokeai.backend.model_manager.configs.lora")
    loader = importlib.import_module("invokeai.backend.model_manager.load.model_loaders.lora")
    patcher = importlib.import_module("invokeai.backend.patches.layer_patcher").LayerPatcher
    kinds = [
        kind
        for name, kind in vars(configs).items()
        if name.startswith("LoRA_LyCORIS_") and "Base" not in name
    ]

    def recognise(tensors: dict[str, Tensor]) -> Iterator[object]:
        """The bases that it takes a file to be of; files have their keys in this order."""
        ordered = dict(sorted(tensors.items()))
        file = SimpleNamespace(load_state_dict=lambda *_: ordered, metadata=dict, path=Path("x"))
        for kind in kinds:
            with suppress(configs.NotAMatchError):
                kind._validate_looks_like_lora(file)
                kind._validate_base(file)
                yield kind.model_fields["base"].default

    def open_model(family: Family, layout: str) -> Read | None:
        if layout not in BASES:
            return None
        name, constants = BASES[layout]
        base = getattr(base_type, name)
        shapes: dict[str, tuple[int, ...]] = dict(load_layout(layout).shapes)
        if layout in BY_AUTHORS:
            stored = name_weights(family, layout).items()
            shapes = {key.removesuffix(".weight"): shape for key, shape in stored}
        prefix, flat = "lora_unet_", True
        if constants:
            module = f"invokeai.backend.patches.lora_conversions.{constants}_lora_constants"
            values = vars(importlib.import_module(module))
            prefix = next(v for k, v in values.items() if k.endswith("_LORA_TRANSFORMER_PREFIX"))
            flat = False
        places: dict[str, tuple[nn.Module, bool]] = {prefix: (_Tree(shapes), flat)}
        with torch.device("meta"):
            for start, text in ENCODERS.get(layout, {}).items():
                encoder = build_encoder(text)
                places[start] = (encoder, flat)

        def read(tensors: dict[str, Tensor], keys: Keys) -> set[str]:
            if base not in [*recognise(tensors)]:
                return set()
            return follow(tensors, base, places)

        return read

    def load(base: object, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Its layers of a file."""
        one = SimpleNamespace(_model_base=base, _torch_dtype=torch.float32)
        format_ = loader.ModelFormat.LyCORIS
        config = SimpleNamespace(path="x.safetensors", format=format_, base=base)
        loader.load_file = lambda *_, **__: dict(tensors)
        return dict(loader.LoRALoader._load_model(one, config).layers)

    def follow(
        tensors: dict[str, Tensor], base: object, places: dict[str, tuple[nn.Module, bool]]
    ) -> set[str]:
        """The keys whose factors arrive at a module of their shape."""
        marked, marks = mark_pairs(tensors)
        arrived: set[str] = set()
        for key, layer in load(base, marked).items():
            start = next((start for start in places if key.startswith(start)), None)
            if start is None:
                continue
            tree, flat = places[start]
            try:
                _, module = patcher._get_submodule(tree, key.removeprefix(start), flat)
            except AttributeError:
                continue
            for down, rows in list_factors(layer):
                shape = getattr(module, "weight", torch.empty(0)).shape
                if len(shape) > 1 and (rows, down[0].numel()) == (shape[0], shape[1:].numel()):
                    arrived |= {marks[mark] for mark in down.unique().tolist() if mark in marks}
        ours = {key for key in tensors if key.rpartition(".lora_")[0] in arrived}
        return ours | ({f"{path}.alpha" for path in arrived} & tensors.keys())

    def list_factors(layer: Any) -> Iterator[tuple[Tensor, int]]:
        """(down, rows of all) of a layer, of each of its parts where it is fused."""
        if hasattr(layer, "lora_layers"):
            parts = [part for part in layer.lora_layers if hasattr(part, "up")]
            rows = sum(len(part.up) for part in parts)
            yield from ((part.down, rows) for part in parts)
        elif hasattr(layer, "up"):
            yield layer.down, len(layer.up)

    return open_model
