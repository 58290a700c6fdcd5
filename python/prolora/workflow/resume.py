"""What a result was made from and how, in its own header: a run that was cut off goes on there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.unread import ADAPTER_FILES, PEFT_WEIGHTS
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import compute_identity
from ..comparison.module_map import Matching
from ..errors import ProLoRAError
from ..files.hashing import hash_parts, hash_text, read_blocks
from ..files.safetensors_file import SafetensorsFile
from ..version import __version__
from .options import Options

KEYS = ("lora_hash", "recipe")
# What says how the work is done and not what comes out.
_INDIFFERENT = ("cache", "device", "progress", "max_memory")


def make_recipe(
    lora: Path,
    source: Base,
    target: Base,
    options: Options,
    format: str,
    dtype: Any,
    cache: BasisCache,
) -> dict[str, str]:
    """`KEYS` -> text: equal for equal inputs, options and version, and for nothing else.

    Args:
        lora: a file or folder.
        source: base it was trained on.
        target: base it moves to.
        options: as they were asked for.
        format: as `Transfer.save` takes it.
        dtype: likewise.
        cache: remembers the hashes of files.
    """
    chosen = {
        field.name: _jsonable(getattr(options, field.name))
        for field in fields(options)
        if field.name not in _INDIFFERENT
    }
    bases = [compute_identity(base, cache) or base.name for base in (source, target)]
    text = json.dumps([__version__, bases, chosen, format, str(dtype)], sort_keys=True)
    return {
        "lora_hash": f"sha256:{_hash_adapter(lora)}",
        "recipe": f"sha256:{hash_text(text)}",
    }


def is_made(out: Path, wanted: Mapping[str, str]) -> bool:
    """Whether `out` is a whole result of that recipe: its header says so, and fits its size."""
    file = out / PEFT_WEIGHTS if out.is_dir() else out
    try:
        metadata = SafetensorsFile(file).metadata
    except ProLoRAError:
        return False
    return all(metadata.get(f"prolora.{key}") == wanted[key] for key in KEYS)


def _jsonable(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, Matching):
        return "similarity"  # which the two bases determine
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, PathLike) or (isinstance(value, str) and value.endswith(".json")):
        return _hash_adapter(Path(value)) if Path(value).exists() else str(value)
    return value if isinstance(value, str | int | float | None) else repr(value)


def _hash_adapter(path: Path) -> str:
    """SHA-256 of a file, or of the files of an adapter's folder."""
    files = [path / name for name in ADAPTER_FILES] if path.is_dir() else [path]
    return hash_parts(block for file in files if file.is_file() for block in read_blocks(file))
