"""diffusers: the scripts in its folder `examples` that train a LoRA with PEFT.

A script is not run: its code names the layers to train and the pipeline whose `save_lora_weights`
writes the file. PEFT adds the LoRA to diffusers' class in the published size.
"""

from __future__ import annotations

import ast
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loader_programs.text_encoders import build_clip
from torch import Tensor, nn

from . import RANK, Cell, find_fields
from .ai_toolkit import build_model, of_diffusers
from .simpletuner import OTHERS

SCRIPTS: tuple[tuple[str, str, str], ...] = (
    ("text_to_image/train_text_to_image_lora", "sd15", "sd15"),
    ("text_to_image/train_text_to_image_lora_sdxl", "sdxl", "sdxl"),
    ("dreambooth/train_dreambooth_lora", "sd15", "sd15"),
    ("dreambooth/train_dreambooth_lora_sdxl", "sdxl", "sdxl"),
    ("dreambooth/train_dreambooth_lora_sd3", "sd3", "sd3-medium"),
    ("dreambooth/train_dreambooth_lora_sd3", "sd3", "sd3.5-medium"),
    ("dreambooth/train_dreambooth_lora_sd3", "sd3", "sd3.5-large"),
    ("dreambooth/train_dreambooth_lora_flux", "flux", "flux1-dev"),
    ("dreambooth/train_dreambooth_lora_flux_kontext", "flux", "flux1-dev"),
    ("dreambooth/train_dreambooth_lora_flux2", "flux2", "flux2-dev"),
    ("dreambooth/train_dreambooth_lora_flux2_klein", "flux2", "flux2-klein-4b"),
    ("dreambooth/train_dreambooth_lora_flux2_klein", "flux2", "flux2-klein-9b"),
    ("dreambooth/train_dreambooth_lora_hidream", "hidream", "hidream-i1"),
    ("dreambooth/train_dreambooth_lora_ideogram4", "ideogram4", "ideogram4"),
    ("dreambooth/train_dreambooth_lora_krea2", "krea2", "krea2"),
    ("dreambooth/train_dreambooth_lora_lumina2", "lumina2", "lumina2"),
    ("dreambooth/train_dreambooth_lora_qwen_image", "qwen-image", "qwen-image"),
    ("dreambooth/train_dreambooth_lora_sana", "sana", "sana-1.6b"),
    ("dreambooth/train_dreambooth_lora_z_image", "z-image", "z-image"),
    ("advanced_diffusion_training/train_dreambooth_lora_flux_advanced", "flux", "flux1-dev"),
    ("advanced_diffusion_training/train_dreambooth_lora_sd15_advanced", "sd15", "sd15"),
    ("advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced", "sdxl", "sdxl"),
    ("cogvideo/train_cogvideox_lora", "cogvideox", "cogvideox-5b"),
    ("cogvideo/train_cogvideox_image_to_video_lora", "cogvideox", "cogvideox-5b-i2v"),
    ("cosmos/train_cosmos_predict25_lora", "cosmos", "cosmos-predict2.5-2b"),
)
"""The script, and family and layout in prolora."""

ENCODERS = {
    "sd15": ("clip-l",),
    "sdxl": ("clip-l", "clip-bigg"),
    "sd3": ("clip-l", "clip-bigg"),
    "flux": ("clip-l",),
}


def list_cells(checkout: Path) -> Iterator[Cell]:
    for script, family, layout in SCRIPTS:
        text = (checkout / "examples" / f"{script}.py").read_text("utf-8")
        yield from make_cells(script, text, family, layout)


def make_cells(script: str, text: str, family: str, layout: str) -> Iterator[Cell]:
    """Makes the file of a script, with text encoders too, and each as it is for ComfyUI."""
    tree = ast.parse(text)
    denoiser, encoder = find_targets(tree)
    pipeline = find_pipeline(tree)
    fields: dict[str, Any] = {"family": family, "layout": layout, "how": "network class"}
    name = f"{script.rpartition('/')[2]} {layout}"
    note = f"LoraConfig with the targets of the script, {pipeline.__name__}.save_lora_weights"
    old = "convert_state_dict_to_diffusers(" in text
    base = build_model(OTHERS[layout]) if layout in OTHERS else of_diffusers(layout)()
    kind = "unet" if hasattr(pipeline, "unet_name") else "transformer"
    layers = {f"{kind}_lora_layers": add_lora(base, denoiser, old)}
    files = {name: save(pipeline, **layers)}
    if encoder:
        layers |= add_text(ENCODERS[family], encoder, old)
        files[f"{name}, with text encoders"] = save(pipeline, **layers)
    for name, state in files.items():
        yield Cell(name, note=note, **find_fields(state), **fields)
        if "convert_state_dict_to_kohya(" in text:
            utils = importlib.import_module("diffusers.utils")
            state = utils.convert_state_dict_to_kohya(utils.convert_all_state_dict_to_peft(state))
            note_ = f"{note}, convert_state_dict_to_kohya"
            yield Cell(f"{name}, for ComfyUI", note=note_, **find_fields(state), **fields)


def find_targets(tree: ast.Module) -> tuple[list[str], list[str]]:
    """Returns the layers that a script trains by default: of the denoiser, of the text encoders.

    They are the lists that need no option of the command line, for example
    ["to_k", "to_q", "to_v", "to_out.0"]; the last one, if there are several.
    """
    named: dict[str, list[str]] = {}
    given = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if "target_modules" in name and (found := evaluate(value)):
                named[name] = found
        elif isinstance(node, ast.keyword) and node.arg == "target_modules":
            if found := evaluate(node.value):
                given.append(found)
    text = [found for found in [*named.values(), *given] if "q_proj" in found]
    other = [found for found in [*named.values(), *given] if "q_proj" not in found]
    return other[-1], text[-1] if text else []


def evaluate(node: ast.expr) -> list[str]:
    """Returns the value of an expression; [] if it depends on other variables."""
    try:
        return eval(compile(ast.Expression(node), "script", "eval"), {})  # type: ignore[no-any-return]
    except NameError:
        return []


def find_pipeline(tree: ast.Module) -> Any:
    """Returns the class whose `save_lora_weights` a script calls."""
    names = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "save_lora_weights"
        and isinstance(node.value, ast.Name)
    }
    (name,) = names
    for module in ("diffusers", "diffusers.loaders"):
        if hasattr(importlib.import_module(module), name):
            return getattr(importlib.import_module(module), name)
    raise ValueError(f"diffusers has no {name}")


def add_lora(model: nn.Module, targets: list[str], old: bool) -> dict[str, Tensor]:
    """Returns the LoRA of a model; `old`: with the keys of diffusers before PEFT."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets
    )
    with torch.device("meta"):
        inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return convert_state_dict_to_diffusers(state) if old else state


def add_text(names: tuple[str, ...], targets: list[str], old: bool) -> dict[str, Any]:
    """Returns the arguments of `save_lora_weights` for text encoders."""
    given: dict[str, Any] = {}
    for number, name in enumerate(names):
        with torch.device("meta"):
            state = add_lora(build_clip(name), targets, old)
        given["text_encoder_lora_layers" if not number else "text_encoder_2_lora_layers"] = state
    return given


def save(pipeline: Any, **layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs `save_lora_weights`; returns what it would store."""
    files: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(
            folder, save_function=lambda state, _: files.append(state), **layers
        )
    return files[0]
