"""Opening a base model, whatever it comes as."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnsupportedFormat
from ..storage import SafetensorsFile
from .base import Base, LoadedWeight, StoredWeight, Weight
from .folder import folder_weights, model_folder
from .naming import name_weights

Source = str | os.PathLike[str] | Mapping[str, Tensor] | torch.nn.Module | Base


def open_base(source: Source, *, subfolder: str | None = None) -> Base:
    """Opens a base model; only headers are read.

    Args:
        source: one of
            a diffusers folder, of a whole pipeline or of its UNet or transformer alone. Where it
                has several variants the plain file is taken, else fp16, bf16, fp32, any other;
            a single-file checkpoint in LDM/SGM or in diffusers names, with or without a prefix;
            a mapping {name: tensor} or a module, whose tensors are used as they are;
            a `Base`, which is returned.
        subfolder: the part of the pipeline folder, if not `unet` or `transformer`.

    Raises:
        UnsupportedFormat: what cannot be read exactly, with the reason: pickles, GGUF, quantised
            weights, FLUX in its authors' spelling, an adapter, a damaged or incomplete download.
    """
    if isinstance(source, Base):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source), subfolder)
    if isinstance(source, Mapping):
        return _open_tensors(source, "state dict")
    for part in ("unet", "transformer"):  # a diffusers pipeline, recognised without importing it
        model = getattr(source, part, None)
        if not isinstance(source, torch.nn.Module) and isinstance(model, torch.nn.Module):
            return open_base(model)
    if isinstance(source, torch.nn.Module):
        parameters = {
            name.removeprefix("_orig_mod."): parameter  # torch.compile's wrapper
            for name, parameter in source.named_parameters()
        }
        return _open_tensors(parameters, type(source).__name__)
    raise UnsupportedFormat(
        f"a base model is a path, a mapping of tensors or a torch module, not {type(source)}"
    )


def _open_path(path: Path, subfolder: str | None) -> Base:
    """A file or a folder."""
    weights: Mapping[str, Weight]
    name = path.resolve().name
    if path.is_dir():
        folder = model_folder(path, subfolder)
        weights, files = folder_weights(folder)
    elif path.exists():
        file = SafetensorsFile(path)
        weights, files = {key: StoredWeight(file, key) for key in file.tensors}, [path]
    else:
        raise UnsupportedFormat(
            f"{path}: no such file or folder (models are not downloaded; give a local path)"
        )
    _refuse_quantised_headers(weights)
    strict = subfolder is None
    return Base(name, name_weights(weights, str(path), strict=strict), path, files)


def _refuse_quantised_headers(weights: Mapping[str, Weight]) -> None:
    """ComfyUI notes quantised layers in the header's metadata."""
    files = {w.file.path: w.file for w in weights.values() if isinstance(w, StoredWeight)}
    for path, file in files.items():
        if "_quantization_metadata" in file.metadata:
            raise UnsupportedFormat(
                f"{path}: a quantised checkpoint (its metadata says so); its scales are not read "
                "yet: use the fp16, bf16 or plain fp8 version"
            )


def _open_tensors(tensors: Mapping[str, Tensor], name: str) -> Base:
    """Tensors that are in memory already. Their names are taken on trust."""
    weights: dict[str, Weight] = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedFormat(f"{name}: {key} is a {type(tensor)}, not a torch tensor")
        if tensor.is_meta:
            raise UnsupportedFormat(f"{name}: {key} has no values (it is on the meta device)")
        weights[key] = LoadedWeight(tensor.detach(), f"{name}:{key}")
    return Base(name, name_weights(weights, name, strict=False))
