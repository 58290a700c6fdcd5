"""What the nodes ask of ComfyUI: names of files, the progress bar, the stop button, its loader."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths

from .jobs import Place

BASE_FOLDERS = ("checkpoints", "diffusion_models", "unet_gguf")
ALL_LORAS = "(all)"


def list_loras() -> list[str]:
    """LoRA files, as ComfyUI's own loader names them."""
    return folder_paths.get_filename_list("loras")


def list_lora_folders() -> list[str]:
    """Folders that hold LoRAs, below ComfyUI's."""
    parents = {os.path.dirname(name) for name in list_loras()}
    return [ALL_LORAS, *sorted(parents - {""})]


def list_bases() -> list[str]:
    """Base models as "folder/name", checkpoints first."""
    known = folder_paths.folder_names_and_paths
    return [
        f"{folder}/{name}"
        for folder in BASE_FOLDERS
        if folder in known
        for name in folder_paths.get_filename_list(folder)
    ]


def find_lora(name: str) -> Path:
    """The path of a LoRA."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def find_base(name: str) -> Path:
    """The path of a base model; its weights are streamed from there, it is never loaded."""
    folder, _, rest = name.partition("/")
    return Path(folder_paths.get_full_path_or_raise(folder, rest))


def find_output_root() -> Path:
    """The folder that moved LoRAs are written below: the first of ComfyUI's for LoRAs."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def find_place(target: str) -> Place:
    """Where the LoRAs of a base model are written."""
    return Place(find_output_root(), target.partition("/")[2])


def name_lora(path: Path) -> str:
    """A LoRA's name for ComfyUI's loader, from its path."""
    return str(path.relative_to(find_output_root()))


def make_progress() -> Callable[[int, int, str], None]:
    """A callback for prolora: moves the node's bar, and raises once the stop button is pressed."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int, name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(1, total))

    return progress


def apply_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """The model and the text encoder with a LoRA, by ComfyUI's loader."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
    return model, clip
