"""The LoRAs of a collection: files, folders, lists of them, and repositories on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...adapters.folder import ADAPTER_FILES
from ...adapters.hub import fetch_adapters
from ...errors import ProLoRAError, UnsupportedFormat
from ...files.hub import find_hub_id, is_hub_address
from ...files.outside import read_text

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class ListedLora:
    """A LoRA of a collection.

    Attributes:
        path: absolute path of a file or of an adapter's folder.
        source: the base it was trained on, where a list names it; "" elsewhere.
        error: why a list's id was not fetched; the path is then where it is not either.
    """

    path: Path
    source: str = ""
    error: ProLoRAError | None = None


def list_loras(
    collection: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[ListedLora]:
    """The LoRAs of a collection, each once, in a fixed order.

    Args:
        collection: each is a .safetensors file; the folder of an adapter (PEFT's or diffusers'); a
            folder, whose files and adapters are taken, those in folders below it too; a text file
            with a path or an id in each line, and behind a tab the source base if that is known;
            `org/name`, `hf://org/name` or `hf://collections/org/slug` on the hub, of which the
            adapters are fetched.

    Raises:
        UnsupportedFormat: there is no such file or folder, the hub does not give it, or there is no
            LoRA in all of them.
    """
    listed: dict[Path, ListedLora] = {}
    members = [collection] if isinstance(collection, str | os.PathLike) else list(collection)
    for member in members:
        for lora in _list_member(member):
            listed.setdefault(lora.path, lora)
    if not listed:
        names = ", ".join(os.fspath(member) for member in members) or "nothing"
        raise UnsupportedFormat(f"there is no LoRA in {names}")
    return list(listed.values())


def _list_member(member: str | os.PathLike[str]) -> Iterator[ListedLora]:
    text = os.fspath(member)
    if is_hub_address(text) or find_hub_id(text):
        for folder in fetch_adapters(text):
            yield from map(ListedLora, _walk(folder))
        return
    path = Path(os.path.abspath(text))
    if path.is_dir():
        yield from map(ListedLora, _walk(path))
    elif path.suffix.lower() == _WEIGHTS:
        yield ListedLora(path)
    elif path.suffix.lower() in (".txt", ".tsv", ".list"):
        yield from _read_list(path)
    else:
        raise UnsupportedFormat(
            f"{text}: is no .safetensors file, no folder, no list (.txt) of them and no address on "
            "the hub (org/name)"
        )


def _walk(folder: Path) -> Iterator[Path]:
    """The adapters in a folder and below it; the folder of an adapter is one."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        if any(name in files for name in ADAPTER_FILES):
            yield Path(place)
            rest = [name for name in files if name not in ADAPTER_FILES]
        else:
            rest = files
        yield from (Path(place, name) for name in sorted(rest) if name.lower().endswith(_WEIGHTS))


def _read_list(path: Path) -> Iterator[ListedLora]:
    """The lines of a list; relative paths are below its folder, and ids are fetched."""
    for line in read_text(path, "utf-8-sig").splitlines():
        name, _, source = line.partition("\t")
        if name.strip() and not name.startswith("#"):
            name, source = name.strip(), source.strip()
            lora = Path(os.path.abspath(path.parent / name))
            is_below = os.path.exists(lora) or os.path.isdir(lora.parent)
            if is_hub_address(name) or (not is_below and find_hub_id(name)):
                try:
                    folders = fetch_adapters(name)
                except ProLoRAError as error:  # one line does not stop the others
                    yield ListedLora(lora, source, error)
                    continue
                for folder in folders:
                    yield from (ListedLora(found, source) for found in _walk(folder))
            else:
                yield ListedLora(lora, source)
