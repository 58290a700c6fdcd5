"""Opening a base model, whatever it comes as."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..architectures.aliases import find_named, list_base_names
from ..architectures.layouts import load_layout
from ..architectures.modules import TEXT_ENCODERS
from ..core.arrays import MatrixLike, to_tensor
from ..core.validation import check_layout
from ..errors import (
    InvalidOption,
    MissingFile,
    ShapeMismatch,
    UnsupportedFormat,
    describe_missing,
    suggest,
)
from ..files.hub import find_hub_id
from ..files.safetensors_file import SafetensorsFile
from .base import Base
from .folder import explain_experts, find_model_folder, open_file_weights, open_folder_weights
from .hub_models import fetch_model
from .keys.canonical_names import name_weights
from .leaves import Leaves
from .quantised.joining import join_quantised
from .weights import LoadedWeight, RequestedWeight, StoredWeight, Weight

BaseLike = str | os.PathLike[str] | Mapping[str, MatrixLike] | torch.nn.Module | Base
Outline = Mapping[str, Sequence[int] | Tensor]
"""Names and shapes of weights, or tensors on the meta device."""

log = logging.getLogger(__name__)

_GENERIC = ("diffusion_pytorch_model", "model", "unet", "transformer")  # of any model


def open_base(
    source: BaseLike | Outline,
    *,
    subfolder: str | None = None,
    read: Callable[[str], MatrixLike] | None = None,
) -> Base:
    """Opens a base model; only headers are read.

    Args:
        source: one of
            a diffusers folder, of a whole pipeline or of its UNet or transformer alone. Where it
                has several variants the plain file is taken, else fp16, bf16, fp32, any other. Text
                encoders beside it are opened too, where they are safetensors. The folder of one
                expert where a pipeline has two (see `open_experts`);
            a single-file checkpoint: safetensors or GGUF. Its names may be LDM's and SGM's, an ADM
                network's (guided diffusion, consistency models), diffusers' or the authors' of a
                known family, with or without a prefix. A transformer of any other family, or a
                network without attention that takes in the time step, keeps its names;
            a model on the Hugging Face Hub, `org/name` or `hf://org/name[@revision][/path]`, if
                `huggingface_hub` is installed; only the files needed are fetched;
            the name of a published model ("anima-2.9b", "pony"), which stands for shapes alone: a
                transfer goes by names then, and compares nothing;
            a mapping {name: tensor} or a module, whose tensors are used as they are, numpy's too;
                on the meta device they allow only a dry run. A module's transposed convolutions are
                left out, as PEFT has no LoRA for them;
            a mapping {name: shape}, or of tensors on the meta device, with `read`;
            a `Base`, which is returned.
        subfolder: the part of the pipeline folder, if not `unet` or `transformer`.
        read: returns the weight of a name, and is called for those alone that are needed, each time
            they are. Numbers are taken in the dtype of the meta tensor, else as float32.

    Raises:
        UnsupportedFormat: what cannot be read exactly, with the reason: pickles, weights of a
            quantised kind whose shapes are not known, an adapter, a damaged or incomplete
            download, a pipeline of two experts.
        ShapeMismatch: a fused matrix that cannot be cut as its name says.
    """
    if isinstance(source, Base):
        return source
    if read is not None:
        if not isinstance(source, Mapping):
            raise InvalidOption("`read` needs a mapping of names to shapes, or to meta tensors")
        return _open_outline(cast(Outline, source), read)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, subfolder)
    if isinstance(source, Mapping):
        return _open_tensors(cast(Mapping[str, MatrixLike], source), "state dict")
    for part in ("unet", "transformer"):  # a diffusers pipeline, recognised without importing it
        model = getattr(source, part, None)
        if not isinstance(source, torch.nn.Module) and isinstance(model, torch.nn.Module):
            if isinstance(getattr(source, "transformer_2", None), torch.nn.Module):
                parts = ["its transformer", "its transformer_2"]
                raise UnsupportedFormat(explain_experts(type(source).__name__, parts))
            return open_base(model)
    if isinstance(source, torch.nn.Module):
        return _open_tensors(_list_parameters(source), type(source).__name__)
    raise UnsupportedFormat(
        f"a base model is a path, a mapping of tensors or a torch module, not {type(source)}"
    )


def open_pair(source: BaseLike, target: BaseLike) -> tuple[Base, Base]:
    """Opens two base models; equal names get folders in front, or say which is which."""
    first, second = open_base(source), open_base(target)
    if first.name == second.name and first.path != second.path:
        one, two = (base.path.parts if base.path else () for base in (first, second))
        shared = len(os.path.commonprefix([one, two]))  # noqa: RUF071 (of parts)
        first = replace(first, name="/".join(one[shared:]) or first.name)
        second = replace(second, name="/".join(two[shared:]) or second.name)
    elif first.name == second.name and first.path is None and first is not second:
        first, second = replace(first, name="the source"), replace(second, name="the target")
    return first, second


def _list_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns a model's own parameters, without torch.compile's and PEFT's wrappers.

    Raises:
        UnsupportedFormat: an adapter was merged into the weights, which are not the base's then.
    """
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):  # a peft.PeftModel
        model = model.get_submodule("base_model.model")
    attached = [f"{name}." for name, layer in model.named_modules() if hasattr(layer, "base_layer")]
    for name in attached:
        layer = model.get_submodule(name.removesuffix("."))
        if getattr(layer, "merged", False):
            raise UnsupportedFormat(
                f"{type(model).__name__}: an adapter is merged into {name.removesuffix('.')}, so "
                "its weight is not the base model's; unfuse it first (pipe.unfuse_lora())"
            )
    transposed = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    }
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in transposed:
            continue
        prefix = next((prefix for prefix in attached if name.startswith(prefix)), None)
        if prefix is not None:
            inside = name.removeprefix(prefix)
            if not inside.startswith("base_layer."):
                continue
            name = prefix + inside.removeprefix("base_layer.")
        parameters[name.removeprefix("_orig_mod.")] = parameter
    return parameters


def _open_path(source: str | os.PathLike[str], subfolder: str | None) -> Base:
    path = Path(source)
    if os.path.exists(path):
        named = path.resolve()
        while named.name.split(".")[0] in _GENERIC:
            named = named.parent
        name = named.name or path.name
    else:
        id_ = find_hub_id(source)
        if id_ is None:
            return _open_named(os.fspath(source))
        path, name, subfolder = fetch_model(id_, subfolder), id_.name, None
    path = Path(os.path.abspath(path))  # weights are read later, maybe from another working folder
    is_folder = path.is_dir()
    folder = find_model_folder(path, subfolder) if is_folder else path
    stored = open_folder_weights(folder) if is_folder else open_file_weights(path)
    encoders, more = _open_text_encoders(path) if is_folder and not subfolder else ({}, [])
    leaves = _list_files(stored)
    metadata = _list_metadata(leaves)
    names = name_weights(stored | encoders, str(path), metadata=metadata, strict=subfolder is None)
    leaves += more
    files = [one.file.path for one in leaves]
    return Base(name, *names, path, files or [path], tuple(leaves))


def _open_named(name: str) -> Base:
    """Opens a published model by its name alone: its modules and their shapes, without weights."""
    named = find_named(name)
    if named is None:
        missing = describe_missing(name, "file, folder or model of the hub (org/name)")
        raise MissingFile(f"{missing}{suggest(name.lower(), list_base_names())}")
    if len(named.sizes) > 1:
        raise MissingFile(
            f"{name}: no such file or folder, and as a name it can be {', '.join(named.sizes)}; "
            "give one of these, or the model's file"
        )

    def refuse(key: str) -> MatrixLike:
        raise UnsupportedFormat(
            f"{named.title} was given by its name, without weights; give the model's file or folder"
        )

    weights: dict[str, Weight] = {
        module: RequestedWeight(module, f"{named.title}:{module}", shape, torch.float32, refuse)
        for module, shape in load_layout(named.sizes[0]).shapes.items()
    }
    return Base(named.title, weights, by_name=True)


def _open_text_encoders(pipeline: Path) -> tuple[dict[str, Weight], list[Leaves]]:
    """Opens the text encoders of a pipeline folder, except unreadable ones.

    A transfer needs them only to compare, and many folders hold them as pickles alone.
    """
    weights: dict[str, Weight] = {}
    files: list[Leaves] = []
    for encoder in TEXT_ENCODERS:
        folder = pipeline / encoder
        if not folder.is_dir():
            continue
        try:
            encoders = open_folder_weights(folder)
            more = _list_files(encoders)
            # Before the names change, which notes in the header go by.
            stored = join_quantised(encoders, _list_metadata(more), str(folder))
        except UnsupportedFormat as error:
            log.info("the text encoder %s is left out: %s", folder, error)
            continue
        weights |= {f"{encoder}.{key}": weight for key, weight in stored.items()}
        files += more
    return weights, files


def _list_files(weights: Mapping[str, StoredWeight]) -> list[Leaves]:
    return list(dict.fromkeys(weight.leaves for weight in weights.values()))


def _list_metadata(files: list[Leaves]) -> list[Mapping[str, str]]:
    return [one.file.metadata for one in files if isinstance(one.file, SafetensorsFile)]


def _open_outline(outline: Outline, read: Callable[[str], MatrixLike]) -> Base:
    """Opens a base whose owner returns its weights when they are requested."""
    weights: dict[str, Weight] = {}
    _check_names(outline, "the base")
    for key, given in outline.items():
        shape = tuple(given.shape if isinstance(given, Tensor) else given)
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ShapeMismatch(f"{key}: {shape!r:.80} is not the shape of a weight")
        dtype = given.dtype if isinstance(given, Tensor) else torch.float32
        weights[key] = RequestedWeight(key, f"the base:{key}", shape, dtype, read)
    return Base("the base", *name_weights(weights, "the base", strict=False))


def _check_names(given: Mapping[str, object], where: str) -> None:
    for key in given:
        if not isinstance(key, str):
            raise UnsupportedFormat(f"{where}: {key!r:.80} is no name of a weight, which is a text")


def _open_tensors(tensors: Mapping[str, MatrixLike], name: str) -> Base:
    """Opens tensors that are in memory already, and takes their names on trust."""
    weights: dict[str, Weight] = {}
    _check_names(tensors, name)
    for key, array in tensors.items():
        if not hasattr(array, "shape"):
            raise UnsupportedFormat(
                f"{name}: {key} is a {type(array).__name__}, not a tensor; names and shapes alone "
                "are opened by open_base(names_and_shapes, read=…)"
            )
        where, tensor = f"{name}:{key}", to_tensor(array, f"{name}: {key}").detach()
        if not tensor.is_complex():  # a table of rotations; a weight is refused by its name
            check_layout(where, tensor)
        if tensor.is_meta:
            shape = tuple(tensor.shape)
            weights[key] = RequestedWeight(key, where, shape, tensor.dtype, None)
        else:
            weights[key] = LoadedWeight(tensor, where)
    return Base(name, *name_weights(weights, name, strict=False))
