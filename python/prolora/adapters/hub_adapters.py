"""LoRAs by their id on the Hugging Face Hub: which files of a repository one is."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ..errors import ProLoRAError, UnsupportedFormat
from ..files.hub import (
    WEIGHT_FILES,
    HubId,
    ask_hub,
    download_files,
    find_hub_id,
    find_snapshot,
    list_hub_files,
    not_cached,
    parse_hub_id,
)
from .adapter_folder import PEFT_CONFIG, PEFT_WEIGHTS, choose_files

_WEIGHTS = ".safetensors"
_PIPELINE = "model_index.json"
# Files that a message lists.
_MOST_LISTED = 12


def locate_adapter(lora: str | os.PathLike[str]) -> Path:
    """Returns the local path of a LoRA, or its path in the hub's cache.

    It is looked up on the hub if it is an id and no local file has that name.

    Raises:
        UnsupportedFormat: as `fetch_adapter`.
    """
    id_ = find_hub_id(lora)
    return fetch_adapter(id_) if id_ else Path(lora)


def look_for_adapter(lora: str | os.PathLike[str]) -> Path:
    """Tries `locate_adapter`; if it fails, returns the name as a path."""
    try:
        return locate_adapter(lora)
    except ProLoRAError:
        return Path(lora)  # its reader says why


@lru_cache(maxsize=4096)
def fetch_adapter(id_: HubId) -> Path:
    """Returns the local path of a LoRA, downloaded unless the cache has it.

    In a repository, or in the folder that the id names, it is what PEFT saves there, what diffusers
    saves, or the only .safetensors file. An id is asked for once in a process: so what is hashed is
    what is read, whatever is uploaded meanwhile.

    Raises:
        MissingFile: `huggingface_hub` is not installed, or the hub does not give it.
        UnsupportedFormat: no LoRA, or several and the id names none of them.
    """
    with ask_hub(id_.name) as hub:
        if hub.constants.HF_HUB_OFFLINE:
            folder = find_snapshot(hub, id_)
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
            files = [folder / name for name in _choose_hub_files(names, id_)]
            if [file.name for file in files] == [PEFT_WEIGHTS] and not id_.path.endswith(_WEIGHTS):
                raise not_cached(f"{id_.name}/{PEFT_CONFIG}")  # without which it has no scale
            if not files[0].is_file():
                raise not_cached(id_.name)
        else:
            names, commit = list_hub_files(hub, id_)
            files = download_files(hub, id_, _choose_hub_files(names, id_), commit)
    return files[0] if len(files) == 1 else files[0].parent


def _choose_hub_files(names: list[str], id_: HubId) -> list[str]:
    """Returns the LoRA's files among all names in a repository; refuses none or several."""
    if id_.path.lower().endswith(WEIGHT_FILES):
        return [id_.path]
    folder = PurePosixPath(id_.path)
    here = [path.name for path in map(PurePosixPath, names) if path.parent == folder]
    loras = [name for name in here if name.endswith(_WEIGHTS)]
    own = choose_files(here) or (loras if len(loras) == 1 else [])
    if _PIPELINE in here and not choose_files(here):
        raise UnsupportedFormat(f"{id_.name}: the repository of a model, not a LoRA; give the LoRA")
    if own:
        return [str(folder / name) for name in own]
    listed = [str(folder / name) for name in loras]
    listed = listed or [name for name in names if name.endswith(WEIGHT_FILES)]
    refusal = f"{id_.name}: {'holds several LoRAs' if loras else 'there is no LoRA'}"
    if not listed:
        raise UnsupportedFormat(f"{refusal}: no file of it ends in {_WEIGHTS}")
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    raise UnsupportedFormat(
        f"{refusal}; the repository has {', '.join(sorted(listed)[:_MOST_LISTED])}{more}: name one "
        f"as {id_.spell(min(listed))}"
    )


def fetch_adapters(address: str) -> list[Path]:
    """Returns the local folders of all adapters in a repository or a collection.

    Only .safetensors files and the configurations of adapters are fetched, unless the hub's cache
    has them. `address` is an id as `parse_hub_id` takes it, or `hf://collections/org/slug`.

    Raises:
        MissingFile: `huggingface_hub` is not installed, or the hub does not give it.
    """
    collection = re.fullmatch(r"hf://?collections/([^/]+/[^/]+)", address)
    id_ = None if collection else parse_hub_id(address)
    folders = []
    with ask_hub(id_.name if id_ else address) as hub:
        ids = [id_] if id_ else []
        if collection:
            items = hub.HfApi().get_collection(collection[1]).items
            ids = [HubId(item.item_id) for item in items if item.item_type == "model"]
        for one in ids:
            start = f"{one.path}/" if one.path else ""
            folder = hub.snapshot_download(
                one.repo,
                revision=one.revision,
                allow_patterns=[f"{start}*{_WEIGHTS}", f"{start}*{PEFT_CONFIG}"],
                local_files_only=bool(hub.constants.HF_HUB_OFFLINE),
            )
            folders.append(Path(folder) / one.path)
    return folders
