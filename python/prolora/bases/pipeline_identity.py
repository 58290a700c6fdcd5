"""Named facts that the output of a pipeline or model depends on.

The names let a change be named.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedFormat, input_error
from ..files.hashing import flatten_bytes, hash_file, hash_parts, hash_text
from ..files.jsontext import read_json_object
from ..version import __version__
from .identity import digest_file
from .pipeline_files import PIPELINE_INDEX, UNUSED_PARTS, read_pipeline_index

Facts = dict[str, dict[str, str]]
"""A part (a file, a module, the versions) -> name of a setting -> its value as a text."""

_CONTENT = "content"  # the only setting of a file that is known by a hash alone
_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers")
# No library reads these from a pipeline's folder when it is told to take safetensors only.
_UNREAD = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".md", ".png", ".jpg")
_MOST_BYTES = 1 << 18  # of a file whose settings are listed; longer ones are vocabularies
# They say where a model was and not what it is.
_PLACES = ("_name_or_path", "name_or_path", "_commit_hash")
_NAMED = 4  # changes that a message lists


def describe_versions() -> Facts:
    """Returns the versions of all packages that run a pipeline."""
    versions = {"prolora": __version__}
    for name in _PACKAGES:
        try:  # whether a build is for a GPU does not count
            versions[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions}


def describe_pipeline_folder(folder: Path, memory: Path | None = None) -> Facts:
    """Describes every file that loading a pipeline folder may read.

    Configurations count by setting, all others by a digest of the whole file; `memory` as for
    `digest_file`.

    Raises:
        UnsupportedFormat: no pipeline folder, or a file of it cannot be read.
    """
    index = read_pipeline_index(folder)
    facts: Facts = {PIPELINE_INDEX: _list_settings(index.content)}
    for part in sorted(set(index.parts) - set(UNUSED_PARTS)):
        try:
            files = sorted(file for file in (folder / part).iterdir() if file.is_file())
        except FileNotFoundError:
            continue  # its loader reports this
        except OSError as error:
            raise input_error(folder / part, error) from error
        for file in files:
            if file.suffix not in _UNREAD and not file.name.startswith("."):
                facts[f"{part}/{file.name}"] = _describe_file(file, memory)
    return facts


def _describe_file(file: Path, memory: Path | None) -> dict[str, str]:
    if file.suffix == ".safetensors":
        return {_CONTENT: digest_file(file, memory)}
    if file.name.endswith("config.json") and file.stat().st_size <= _MOST_BYTES:
        return _list_settings(read_json_object(file))
    return {_CONTENT: hash_file(file)}


def describe_live_module(model: nn.Module) -> Facts:
    """Describes a model in memory: configuration, classes, constants, all weights.

    The constants are what a module holds as plain numbers, texts and tuples of them under public
    names, such as a number of heads or an epsilon.
    """
    facts: Facts = {}
    config = getattr(model, "config", None)
    if config is not None:
        facts["configuration"] = _list_settings(_as_mapping(config))
    for name, module in model.named_modules():
        facts[name or "model"] = {"class": _name_class(module), **_list_constants(module)}
    tensors = chain(model.named_parameters(), model.named_buffers())
    facts["weights"] = {
        name: hash_parts([f"{tensor.dtype} {tuple(tensor.shape)} ", flatten_bytes(tensor)])
        for name, tensor in tensors
    }
    return facts


def describe_parts(pipe: Any, without: nn.Module) -> Facts:
    """Describes a diffusers pipeline's parts in memory beside its denoiser `without`."""
    facts: Facts = {
        "pipeline": {"class": _name_class(pipe), **_list_settings(_as_mapping(pipe.config))}
    }
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            if part is not without and name not in UNUSED_PARTS:
                inside = describe_live_module(part)
                facts |= {f"{name} {place}": settings for place, settings in inside.items()}
        elif part is not None and name not in UNUSED_PARTS:
            facts[name] = {"class": _name_class(part), **_list_settings(_as_mapping(part))}
    return facts


def digest_facts(facts: Mapping[str, Any]) -> str:
    """Computes SHA-256 of facts, in hexadecimal."""
    return hash_text(json.dumps(facts, sort_keys=True))


def list_changes(before: Facts, after: Facts) -> list[str]:
    """Lists what differs: "unet/config.json changed: attention_head_dim 8 → 16"."""
    changes = [f"{part} is gone" for part in before if part not in after]
    changes += [f"{part} is new" for part in after if part not in before]
    for part, settings in after.items():
        old = before.get(part, settings)
        if old != settings:
            changes.append(f"{part} changed{_name_settings(old, settings)}")
    return changes


def _name_settings(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Lists the settings that differ, with short values; "" for a hash."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    if names == [_CONTENT]:
        return ""
    told = []
    for name in names[:_NAMED]:
        if name not in before or name not in after:
            told.append(f"{name} is {'new' if name in after else 'gone'}")
        elif max(len(before[name]), len(after[name])) <= 80:
            told.append(f"{name} {before[name]} → {after[name]}")
        else:
            told.append(name)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f": {', '.join(told)}{more}"


def _list_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns setting -> value as JSON; nested objects get dotted names."""
    try:
        return dict(_walk(settings, ""))
    except RecursionError as error:
        raise UnsupportedFormat("a configuration is nested too deeply") from error


def _walk(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if key in _PLACES:
            continue
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _write_value(value)


def _write_value(value: Any) -> str:
    return json.dumps(value, default=_name_value, ensure_ascii=False)


def _name_value(value: Any) -> Any:
    """Writes a value without a JSON form, never as an address in memory.

    An address changes each time.
    """
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "content", None) or _name_class(value)  # an added token of a tokenizer


def _as_mapping(part: Any) -> Mapping[str, Any]:
    """Returns the settings of a configuration, a scheduler or a tokenizer."""
    to_dict: Callable[[], dict[str, Any]] | None = getattr(part, "to_dict", None)
    if isinstance(part, Mapping):
        return part
    if hasattr(part, "get_vocab"):
        # The whole tokenizer as its library writes it, if it can.
        backend = getattr(part, "backend_tokenizer", None)
        words = sorted(part.get_vocab().items())
        text = _write_value(words) if backend is None else backend.to_str()
        return {**getattr(part, "init_kwargs", {}), _CONTENT: hash_text(text)}
    if to_dict is not None:
        return to_dict()
    config = getattr(part, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def _list_constants(module: nn.Module) -> dict[str, str]:
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and name not in _PLACES
        if _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 64 and all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _name_class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
