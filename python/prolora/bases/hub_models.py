"""Base models by their id on the Hugging Face Hub: only the files that are needed are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UnsupportedFormat
from ..files.hub import HubId, ask_hub, download_files, find_snapshot, list_hub_files, not_cached
from .folder import EXPERT_FOLDERS, MODELS, choose_candidate, explain_experts, read_weight_map

_FILES = (".safetensors", ".gguf")


def fetch_model(id_: HubId, subfolder: str | None = None) -> Path:
    """Returns the local path of a model, downloaded unless the cache has it.

    Only weights of the UNet or transformer are fetched, in one variant. With the environment
    variable HF_HUB_OFFLINE set, only the cache is looked at. `subfolder` is the part of the
    pipeline, if not `unet` or `transformer`.

    Raises:
        MissingFile: `huggingface_hub` is not installed, or the hub does not give the files.
        UnsupportedFormat: the repository has no weights that can be told apart.
    """
    path = "/".join(filter(None, (id_.path, subfolder)))
    with ask_hub(id_.name) as hub:
        if hub.constants.HF_HUB_OFFLINE:
            snapshot = find_snapshot(hub, id_) / path
            if not snapshot.exists():
                raise not_cached(id_.name)
            return snapshot
        return _download_model(hub, id_, path)


def _download_model(hub: Any, id_: HubId, path: str) -> Path:
    """Fetches what `_wanted` names, all of one commit."""
    names, commit = list_hub_files(hub, id_)
    if path.endswith(_FILES):
        return download_files(hub, id_, [path], commit)[0]
    folder = _find_model_folder(names, path, id_)
    prefix = f"{folder}/" if folder else ""
    here = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    best = choose_candidate(here)
    if best is None:
        files = [name for name in here if name.endswith(_FILES) and "/" not in name]
        if len(files) != 1:
            listed = f"several checkpoints ({', '.join(files[:4])})" if files else "no weights"
            raise UnsupportedFormat(
                f"{id_.name}: has {listed} in {folder or 'its root'}; name a file as "
                f"hf://{id_.repo}/FILE"
            )
        return download_files(hub, id_, [prefix + files[0]], commit)[0]
    (downloaded,) = download_files(hub, id_, [prefix + best.name], commit)
    if best.sharded:
        for shard in sorted(set(read_weight_map(downloaded).values())):
            hub.hf_hub_download(id_.repo, prefix + shard, revision=commit)
        return downloaded.parent
    return downloaded


def _find_model_folder(names: list[str], path: str, id_: HubId) -> str:
    """Returns the folder with the weights, "" for the root."""
    if path:
        return path
    folders = {name.partition("/")[0] for name in names if "/" in name}
    for experts in EXPERT_FOLDERS:
        if folders.issuperset(experts):
            named = [f"hf://{id_.repo}/{folder}" for folder in experts]
            raise UnsupportedFormat(explain_experts(id_.name, named))
    parts = [part for part in MODELS if part in folders]
    if len(parts) > 1:
        raise UnsupportedFormat(
            f"{id_.name}: has both unet and transformer; write hf://{id_.repo}/unet"
        )
    return parts[0] if parts else ""
