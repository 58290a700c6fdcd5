"""What the nodes ask of ComfyUI: names of files, the progress bar, the stop button, its loader."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import nodes as core
import torch
from aiohttp import web
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder
from PIL import Image, ImageDraw, ImageFont

from . import words
from .jobs import MOVED, Place, find_trained_on, read_state

BASE_FOLDERS = ("checkpoints", "diffusion_models", "unet_gguf")
PIPELINES = "diffusers"
"""ComfyUI's folder of whole pipelines, each of which is a folder with an index."""


def list_loras() -> list[str]:
    """LoRA files, as ComfyUI's own loader names them."""
    return folder_paths.get_filename_list("loras")


def list_trained_loras() -> list[str]:
    """Those that are no results."""
    return [name for name in list_loras() if Path(name).parts[0] != MOVED]


def list_lora_folders() -> list[str]:
    """Folders that hold LoRAs, below ComfyUI's; not those of results."""
    parents = {os.path.dirname(name) for name in list_trained_loras()}
    return sorted(parents - {""})


def _list_pipelines() -> dict[str, Path]:
    """Folders of pipelines by their names; of two with one name the first is taken.

    Not those of two experts (Wan 2.2), of which one LoRA becomes two: their files are chosen.
    """
    found: dict[str, Path] = {}
    for root in folder_paths.folder_names_and_paths.get(PIPELINES, ([],))[0]:
        for folder, parts, files in os.walk(root, followlinks=True):
            if "model_index.json" in files and "transformer_2" not in parts:
                found.setdefault(os.path.relpath(folder, root), Path(folder))
    return found


def map_bases() -> dict[str, Path]:
    """Base models by name, checkpoints first; the folder is named where two have one name."""
    found = [
        (folder, name, folder_paths.get_full_path(folder, name))
        for folder in BASE_FOLDERS
        if folder in folder_paths.folder_names_and_paths
        for name in folder_paths.get_filename_list(folder)
    ]
    found += [(PIPELINES, name, path) for name, path in _list_pipelines().items()]
    counts = Counter(name for _, name, _ in found)
    return {
        (f"{folder}/{name}" if counts[name] > 1 else name): Path(path)
        for folder, name, path in found
        if path
    }


def find_lora(name: str) -> Path:
    """The path of a LoRA."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise words.Refusal(f"{name} is not among your LoRAs any more: choose another one.")
    return Path(path)


def find_base(name: str) -> Path:
    """The path of a base model; its weights are streamed from there, it is never loaded."""
    path = map_bases().get(name)
    if path is None:
        raise words.Refusal(f"{name} is not among your models any more: choose another one.")
    return path


def read_states(names: Iterable[str]) -> str:
    """Size and time of the files of the LoRAs and base models among some texts."""
    bases, states = map_bases(), []
    for name in names:
        lora = folder_paths.get_full_path("loras", name)
        paths = (lora and Path(lora), bases.get(name))
        states += [f"{name}:{read_state(path)}" for path in paths if path]
    return " ".join(states)


ABSENT = ExecutionBlocker(None)
"""The value of an output that is not there; what is connected to it does not run."""

_results: dict[str, list[Path] | None] = {}
_losses: Counter[str] = Counter()


def remember_results(asked: str, paths: list[Path] | None) -> None:
    """Keeps in mind what a node wrote, or found, when it was asked so; None if it refused."""
    _results[asked] = paths


def count_losses(asked: str) -> int:
    """How often a node refused what it was asked, or a file was gone that it had written.

    ComfyUI would show the old report of such a node, and not run it again.
    """
    paths = _results.get(asked, [])
    if paths is None or not all(path.is_file() for path in paths):
        del _results[asked]
        _losses[asked] += 1
    return _losses[asked]


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
    """A callback for prolora: moves the node's bar, and raises once the stop button is pressed.

    Each second it also says on the node how far it is.
    """
    bar, last_shown, foreseen = comfy.utils.ProgressBar(1), time.monotonic(), ""

    def progress(done: int, total: int, name: str) -> None:
        nonlocal bar, last_shown, foreseen
        comfy.model_management.throw_exception_if_processing_interrupted()
        if done < bar.current or max(1, total) != bar.total:
            # Another stage: the bar of the one before would stay full until this one is far beyond.
            bar = comfy.utils.ProgressBar(max(1, total))
        bar.update_absolute(done)
        foreseen = words.preview(name) or foreseen
        if (now := time.monotonic()) - last_shown >= 1:
            last_shown = now
            _tell_progress(words.tell_progress(done / max(1, total), name, foreseen))

    return progress


def _find_server() -> Any:
    """ComfyUI's server, which imported itself long before it asks for nodes; None without one."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(server, "instance", None)


def _tell_progress(text: str) -> None:
    """Shows a line on the node that runs now, in the page that asked for it."""
    server = _find_server()
    page = getattr(server, "client_id", None)
    if page is not None:
        server.send_sync("prolora.progress", {"node": server.last_node_id, "text": text}, page)


def free_memory() -> None:
    """Puts the models that ComfyUI holds on the card away; it loads them again by itself."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def apply_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """The model and the text encoder with a LoRA, by ComfyUI's loader."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
    return model, clip


def find_loaded(graph: dict[str, Any], node: str) -> str | None:
    """The name of the model whose loader feeds a node's input `model`; None if it is not seen."""
    seen = set()
    while node in graph and node not in seen:
        seen.add(node)
        inputs = graph[node]["inputs"]
        for name in ("ckpt_name", "unet_name"):
            if isinstance(inputs.get(name), str):
                return str(inputs[name])
        link = inputs.get("model")
        node = link[0] if isinstance(link, list) else ""
    return None


def list_sampling_inputs() -> dict[str, Any]:
    """The inputs of core's *KSampler* that say how a picture is sampled."""
    inputs = core.NODE_CLASS_MAPPINGS["KSampler"].INPUT_TYPES()["required"]
    return {name: inputs[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler")}


def draw_side_by_side(
    loras: Iterable[tuple[str, str, float]], inputs: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The graph of core's nodes that draws one picture with each LoRA, and its output.

    ComfyUI runs it in place of the node that returns it.

    Args:
        loras: labels, names in ComfyUI's list and strengths, from the left; with a strength of 0
            the picture is drawn without the LoRA.
        inputs: links to a loaded model, its text encoder and its decoder, the two prompts, and what
            *KSampler* takes beside those.
    """
    graph, row, labels = GraphBuilder(), {}, []
    model, clip, vae, prompt, avoid = (
        inputs.pop(name) for name in ("model", "clip", "vae", "prompt", "avoid")
    )
    for label, lora, strength in loras:
        with_lora = (model, clip)
        if strength:
            strengths = {"strength_model": strength, "strength_clip": strength}
            loader = graph.node("LoraLoader", model=model, clip=clip, lora_name=lora, **strengths)
            with_lora = (loader.out(0), loader.out(1))
        positive, negative = (
            graph.node("CLIPTextEncode", clip=with_lora[1], text=text).out(0)
            for text in (prompt, avoid)
        )
        sampled = graph.node(
            "KSampler",
            model=with_lora[0],
            positive=positive,
            negative=negative,
            denoise=1.0,
            **inputs,
        )
        image = graph.node("VAEDecode", samples=sampled.out(0), vae=vae).out(0)
        labels.append(label)
        row[f"picture_{len(labels)}"] = image
    drawn = graph.node("ProloraSideBySide", labels="\n".join(labels), **row).out(0)
    return graph.finalize(), drawn


def join_row(pictures: list[torch.Tensor], labels: list[str]) -> torch.Tensor:
    """Pictures [n, h, w, 3] of one size side by side, each with a line of text above it."""
    row = []
    for picture, label in zip(pictures, labels, strict=True):
        width = picture.shape[2]
        size = max(10, min(width // 12, 40))
        strip = Image.new("RGB", (width, 2 * size), "white")
        font = ImageFont.load_default(size)
        ImageDraw.Draw(strip).text((size // 2, size // 3), label, "black", font)
        text = torch.tensor(list(strip.tobytes())).reshape(1, 2 * size, width, 3) / 255
        labelled = torch.cat([text.expand(len(picture), -1, -1, -1), picture[..., :3].cpu()], 1)
        row.append(torch.nn.functional.pad(labelled, (0, 0, 0, 8), value=1.0))
    return torch.cat(row, dim=2)[:, :, :-8]


PAGES = "/prolora/report"


async def send_page(request: web.Request) -> web.StreamResponse:
    """A report's page, for the link on a node; it may run its own script and do nothing else."""
    moved = (find_output_root() / MOVED).resolve()
    page = (moved.parent / request.query.get("name", "")).resolve()
    if page.suffix != ".html" or moved not in page.parents or not page.is_file():
        return web.Response(status=404)
    return web.FileResponse(page, headers={"Content-Security-Policy": "sandbox allow-scripts"})


TRAINED_ON = "/prolora/trained_on"


async def send_trained_on(request: web.Request) -> web.StreamResponse:
    """The name of the base that a LoRA tells of, for the widget; null if it tells of none."""
    lora = folder_paths.get_full_path("loras", request.query.get("lora", ""))
    if lora is None:
        return web.Response(status=404)
    name = await asyncio.to_thread(find_trained_on, Path(lora), map_bases())
    return web.json_response({"name": name})


def serve_pages() -> None:
    """Lets ComfyUI's server answer the nodes' script; there is none where it runs without it."""
    server = _find_server()
    if server is not None:
        server.routes.get(PAGES)(send_page)
        server.routes.get(TRAINED_ON)(send_trained_on)
