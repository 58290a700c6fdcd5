"""What the nodes ask of ComfyUI: names of files, the progress bar, the stop button, its loader."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
from aiohttp import web

from .jobs import MOVED, Place

BASE_FOLDERS = ("checkpoints", "diffusion_models", "unet_gguf")


def list_loras() -> list[str]:
    """LoRA files, as ComfyUI's own loader names them."""
    return folder_paths.get_filename_list("loras")


def list_lora_folders() -> list[str]:
    """Folders that hold LoRAs, below ComfyUI's; not those of results."""
    parents = {os.path.dirname(name) for name in list_loras() if Path(name).parts[0] != MOVED}
    return sorted(parents - {""})


def _map_bases() -> dict[str, tuple[str, str]]:
    """Name of a base -> ComfyUI's folder for it, and its name there."""
    found = [
        (folder, name)
        for folder in BASE_FOLDERS
        if folder in folder_paths.folder_names_and_paths
        for name in folder_paths.get_filename_list(folder)
    ]
    counts = Counter(name for _, name in found)
    return {
        (f"{folder}/{name}" if counts[name] > 1 else name): (folder, name) for folder, name in found
    }


def list_bases() -> list[str]:
    """Base models, checkpoints first; the folder is named where two models have one name."""
    return list(_map_bases())


def find_lora(name: str) -> Path:
    """The path of a LoRA.

    Raises:
        ValueError: there is none of that name.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"{name} is not among your LoRAs any more: choose another one.")
    return Path(path)


def find_base(name: str) -> Path:
    """The path of a base model; its weights are streamed from there, it is never loaded.

    Raises:
        ValueError: there is none of that name.
    """
    place = _map_bases().get(name)
    path = folder_paths.get_full_path(*place) if place else None
    if path is None:
        raise ValueError(f"{name} is not among your models any more: choose another one.")
    return Path(path)


def read_states(names: Iterable[str]) -> str:
    """Size and time of the LoRAs and base models among some texts."""
    states = []
    for name in names:
        for find in (find_lora, find_base):
            with suppress(ValueError):
                state = find(name).stat()
                states.append(f"{name}:{state.st_size}:{state.st_mtime_ns}")
    return " ".join(states)


def find_output_root() -> Path:
    """The folder that moved LoRAs are written below: the first of ComfyUI's for LoRAs."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def find_place(target: str) -> Place:
    """Where the LoRAs of a base model are written."""
    return Place(find_output_root(), target)


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


PAGES = "/prolora/report"


async def send_page(request: web.Request) -> web.StreamResponse:
    """A report's page, for the link on a node; it may run its own script and do nothing else."""
    moved = (find_output_root() / MOVED).resolve()
    page = (moved.parent / request.query.get("name", "")).resolve()
    if page.suffix != ".html" or moved not in page.parents or not page.is_file():
        return web.Response(status=404)
    return web.FileResponse(page, headers={"Content-Security-Policy": "sandbox allow-scripts"})


def serve_pages() -> None:
    """Lets ComfyUI's server send the pages; there is none where ComfyUI runs without it."""
    # It is imported long before it asks packs for their nodes.
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    if hasattr(server, "instance"):
        server.instance.routes.get(PAGES)(send_page)
