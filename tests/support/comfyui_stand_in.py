"""As much of ComfyUI as prolora's nodes use, in memory.

PROLORA_COMFYUI=FOLDER runs the same tests with the modules of a real checkout instead.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace


class Interrupted(Exception):
    """What ComfyUI raises where the stop button was pressed."""


class ExecutionBlocker:
    """What an output has that is not there."""

    def __init__(self, message):
        self.message = message


class GraphBuilder:
    """The graph that a node puts in its own place."""

    def __init__(self):
        self.nodes = {}

    def node(self, class_type, **inputs):
        """A node, by the outputs of others."""
        name = f"new.{len(self.nodes)}"
        self.nodes[name] = {"class_type": class_type, "inputs": inputs}
        return SimpleNamespace(out=lambda index: [name, index])

    def finalize(self):
        """The graph."""
        return self.nodes


def make_modules(models: Path) -> dict[str, types.ModuleType]:
    """The modules, with `models` as the folder of models."""
    folders = {name: ([str(models / name)], {".safetensors"}) for name in ("checkpoints", "loras")}
    folders["diffusers"] = ([str(models / "diffusers")], ["folder"])
    state = SimpleNamespace(interrupted=False, progress=[], routes={})

    def get_full_path(folder, name):
        path = models / folder / name
        return str(path) if path.is_file() else None

    def get(path):
        return lambda handler: state.routes.setdefault(path, handler)

    def respond(**known):
        return SimpleNamespace(**known)

    def get_filename_list(folder):
        root = models / folder
        return sorted(str(path.relative_to(root)) for path in root.rglob("*.safetensors"))

    def throw_exception_if_processing_interrupted():
        if state.interrupted:
            raise Interrupted

    class ProgressBar:
        """Shows the first value, the last one, and those half a percent above the one before."""

        def __init__(self, total, node_id=None):
            self.total, self.current, self.shown = total, 0, -1

        def update_absolute(self, value, total=None, preview=None):
            self.total, self.current = total or self.total, value
            further = (value - max(0, self.shown)) / self.total
            if self.shown < 0 or value >= self.total or further >= 0.005:
                self.shown = value
                state.progress.append((value, self.total))

    def load_torch_file(path, safe_load=False):
        from safetensors.torch import load_file

        return load_file(path)

    def load_lora_for_models(model, clip, lora, strength_model, strength_clip):
        return (model, lora, strength_model), (clip, strength_clip)

    class KSampler:
        @classmethod
        def INPUT_TYPES(cls):
            inputs = {name: ("INT", {"default": 20}) for name in ("model", "seed", "steps", "cfg")}
            return {"required": inputs | {"sampler_name": (["euler"],), "scheduler": (["simple"],)}}

    contents = {
        "nodes": {"NODE_CLASS_MAPPINGS": {"KSampler": KSampler}},
        "comfy_execution": {},
        "comfy_execution.graph_utils": {
            "GraphBuilder": GraphBuilder,
            "ExecutionBlocker": ExecutionBlocker,
        },
        "folder_paths": {
            "folder_names_and_paths": folders,
            "get_filename_list": get_filename_list,
            "get_full_path": get_full_path,
            "get_folder_paths": lambda folder: list(folders[folder][0]),
        },
        "comfy": {"state": state},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            "unload_all_models": lambda: None,
            "soft_empty_cache": lambda: None,
        },
        "comfy.utils": {"ProgressBar": ProgressBar, "load_torch_file": load_torch_file},
        "comfy.sd": {"load_lora_for_models": load_lora_for_models},
        "server": {
            "PromptServer": SimpleNamespace(
                instance=SimpleNamespace(routes=SimpleNamespace(get=get))
            )
        },
        "aiohttp": {},
        "aiohttp.web": {
            "Request": object,
            "StreamResponse": object,
            "Response": respond,
            "FileResponse": lambda path, headers: respond(status=200, path=path, headers=headers),
            "json_response": lambda data: respond(status=200, text=json.dumps(data)),
        },
    }
    modules = {}
    for name, known in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(known)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    return modules


def install(models: Path, monkeypatch) -> bool:
    """Makes `import folder_paths` and the others work; whether they are a real ComfyUI's."""
    real = os.environ.get("PROLORA_COMFYUI")
    if not real:
        for name, module in make_modules(models).items():
            monkeypatch.setitem(sys.modules, name, module)
        return False
    monkeypatch.syspath_prepend(real)
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    for name in ("checkpoints", "loras", "diffusers"):
        known = folder_paths.folder_names_and_paths[name]
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, name, ([str(models / name)], known[1])
        )
    folder_paths.filename_list_cache.clear()
    return True
