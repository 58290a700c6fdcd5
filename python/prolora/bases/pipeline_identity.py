"""Named facts that the output of a pipeline depends on.

Settings count by their values, all else by a digest of every byte.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnsupportedFormat, input_error
from ..files.hashing import hash_file, hash_text
from ..files.jsontext import read_json_object
from ..version import __version__
from .leaves import digest_file
from .pipeline_files import PIPELINE_INDEX, UNUSED_PARTS, read_pipeline_index

Facts = dict[str, str]
"""A setting or a file -> its value, or the digest of all of it."""

_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers")
# No library reads these from a pipeline's folder when it is told to take safetensors only.
_UNREAD = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".md", ".png", ".jpg")
_MOST_BYTES = 1 << 18  # of a file whose settings are listed; longer ones are vocabularies
# They say where a model was and not what it is.
_PLACES = ("_name_or_path", "name_or_path", "_commit_hash")


def describe_versions() -> Facts:
    """Returns the versions of all packages that run a pipeline."""
    versions = {"prolora": __version__}
    for name in _PACKAGES:
        try:  # whether a build is for a GPU does not count
            versions[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_pipeline_folder(folder: Path, memory: Path | None = None) -> Facts:
    """Describes every file that loading a pipeline folder may read.

    Configurations count by setting, all others by a digest of the whole file; `memory` as for
    `digest_file`.

    Raises:
        UnsupportedFormat: no pipeline folder, or a file of it cannot be read.
    """
    index = read_pipeline_index(folder)
    facts = _list_settings(f"{PIPELINE_INDEX}: ", index.content)
    for part in sorted(set(index.parts) - set(UNUSED_PARTS)):
        try:
            files = sorted(file for file in (folder / part).iterdir() if file.is_file())
        except FileNotFoundError:
            continue  # its loader reports this
        except OSError as error:
            raise input_error(folder / part, error) from error
        for file in files:
            name = f"{part}/{file.name}"
            if file.suffix in _UNREAD or file.name.startswith("."):
                continue
            if file.name.endswith("config.json") and file.stat().st_size <= _MOST_BYTES:
                facts |= _list_settings(f"{name}: ", read_json_object(file))
            else:
                is_large = file.suffix == ".safetensors"
                facts[name] = digest_file(file, memory) if is_large else hash_file(file)
    return facts


def digest_facts(facts: Mapping[str, Any]) -> str:
    """Computes SHA-256 of facts, in hexadecimal."""
    return hash_text(json.dumps(facts, sort_keys=True))


def _list_settings(prefix: str, settings: Mapping[str, Any]) -> Facts:
    """Returns setting -> its value as JSON, without what says where a model was."""
    try:
        return {
            f"{prefix}{key}": json.dumps(value, sort_keys=True)
            for key, value in settings.items()
            if key not in _PLACES
        }
    except RecursionError as error:
        raise UnsupportedFormat(f"{prefix}is nested too deeply") from error
