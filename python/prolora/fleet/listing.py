"""The LoRAs of a collection: files, folders, lists of them, and repositories on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..adapters.adapter_folder import ADAPTER_FILES
from ..adapters.hub_adapters import fetch_adapters
from ..errors import ProLoRAError, UnsupportedFormat
from ..files.hub import find_hub_id, is_hub_address
from ..files.untrusted import read_text

_WEIGHTS, _LONGEST_LINE = ".safetensors", 4096


def list_loras(
    collection: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Returns the LoRAs of a collection, each once, as absolute paths in a fixed order.

    Args:
        collection: each is a .safetensors file; the folder of an adapter (PEFT's or diffusers'); a
            folder, whose files and adapters are taken, also in folders below it; a text file
            with one of these in each line; `org/name`, `hf://org/name` or
            `hf://collections/org/slug` on the hub, whose adapters are fetched.
    """
    members = [collection] if isinstance(collection, str | os.PathLike) else list(collection)
    listed = dict.fromkeys(lora for member in members for lora in _list_member(member))
    if not listed:
        names = ", ".join(os.fspath(member) for member in members) or "nothing"
        raise UnsupportedFormat(f"there is no LoRA in {names}")
    return list(listed)


def _list_member(member: str | os.PathLike[str], around: str = "") -> Iterator[Path]:
    """Yields the LoRAs of one member; a relative path is below `around`."""
    text = os.fspath(member)
    path = Path(os.path.abspath(os.path.join(around, text)))
    is_there = os.path.exists(path) or bool(around and os.path.isdir(path.parent))
    if is_hub_address(text) or (not is_there and find_hub_id(text)):
        try:
            folders = fetch_adapters(text)
        except ProLoRAError:
            if not around:
                raise
            folders = [path]  # of a list, one line does not stop the others
        for folder in folders:
            yield from _walk(folder) if folder.is_dir() else [folder]
    elif os.path.isdir(path):
        yield from _walk(path)
    elif path.suffix.lower() == _WEIGHTS or around:
        yield path
    elif path.suffix.lower() in (".txt", ".list"):
        for line in read_text(path).splitlines():
            if len(line) > _LONGEST_LINE:
                raise UnsupportedFormat(f"{text}: a line of {len(line):,} characters is not a path")
            if line.strip() and not line.startswith("#"):
                yield from _list_member(line.strip(), str(path.parent))
    else:
        raise UnsupportedFormat(
            f"{text}: is no .safetensors file, no folder, no list (.txt) of them and no address on "
            "the hub (org/name)"
        )


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the adapters in a folder and below; an adapter's folder is one."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        if any(name in files for name in ADAPTER_FILES):
            yield Path(place)
        rest = (name for name in sorted(files) if name not in ADAPTER_FILES)
        yield from (Path(place, name) for name in rest if name.lower().endswith(_WEIGHTS))
