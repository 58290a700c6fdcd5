"""Base models by their id on the Hugging Face Hub: only the files that are needed are fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedFormat
from .folder import (
    EXPERT_FOLDERS,
    MODELS,
    choose_candidate,
    explain_experts,
    read_weight_map,
)

# A `Path` made of "hf://org/name" has lost the second slash.
_SCHEME = re.compile(r"hf://?(?=[^/])")
_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:@([\w.-]+))?")
_FILES = (".safetensors", ".gguf")
_NO_ID = (*_FILES, ".ckpt", ".pt", ".pth", ".bin", ".json")


@dataclass(frozen=True)
class HubId:
    """A model on the hub.

    Attributes:
        repo: "org/name".
        revision: branch, tag or commit; None for the default branch.
        path: a file or folder in it, "" for the whole.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @property
    def name(self) -> str:
        """What reports call the base."""
        return "/".join(filter(None, (self.repo, self.path)))


def parse_hub_id(source: str) -> HubId | None:
    """Reads `org/name[@revision]` and `hf://org/name[@revision][/path]`, None for anything else.

    A name that looks like a file, or that lies in a folder that exists here, is a path.

    Raises:
        UnsupportedFormat: it begins with `hf://` and goes on otherwise.
    """
    scheme = _SCHEME.match(source)
    if scheme is None:
        match = _ID.fullmatch(source)
        if source.lower().endswith(_NO_ID) or Path(source).parent.is_dir():
            return None
        return HubId(match[1], match[2]) if match else None
    match = _ID.match(source, scheme.end())
    rest = source[match.end() :] if match else ""
    if match is None or (rest and not rest.startswith("/")) or ".." in rest.split("/"):
        raise UnsupportedFormat(f"{source}: a hub id is hf://org/name[@revision][/path]")
    return HubId(match[1], match[2], rest.strip("/"))


def fetch_model(id_: HubId, subfolder: str | None = None) -> Path:
    """The local file or folder of a model, downloaded unless the hub's cache has it.

    Only weights of the UNet or transformer are fetched, in one variant. With the environment
    variable HF_HUB_OFFLINE set, only the cache is looked at.

    Args:
        id_: the model.
        subfolder: the part of the pipeline, if not `unet` or `transformer`.

    Raises:
        UnsupportedFormat: `huggingface_hub` is not installed, the hub does not give the files, or
            the repository has no weights that can be told apart.
    """
    hub = _import_hub(id_)
    path = "/".join(filter(None, (id_.path, subfolder)))
    try:
        if hub.constants.HF_HUB_OFFLINE:
            folder = hub.snapshot_download(id_.repo, revision=id_.revision, local_files_only=True)
            return Path(folder) / path
        return _download_model(hub, id_, path)
    except UnsupportedFormat:
        raise
    # Which errors the hub's client raises depends on its version and on that of its HTTP library.
    except Exception as error:
        missing = "no such file or folder, and the Hugging Face Hub"
        raise UnsupportedFormat(f"{id_.name}: {missing} {_explain_hub(error)}") from error


def _explain_hub(error: Exception) -> str:
    """What the hub's client says, in a line: which errors it raises depends on its version."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectError", "ConnectionError", "TimeoutException", "Timeout"}:
        return "cannot be reached (no network?); give a local file or folder"
    return f"does not give it: {next(iter(str(error).splitlines()), type(error).__name__)}"


def _import_hub(id_: HubId) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants  # noqa: F401 (a submodule, loaded only when asked for)
    except ImportError as error:
        raise UnsupportedFormat(
            f"{id_.name}: no such file or folder. If it is a model on the Hugging Face Hub, "
            'pip install "prolora[hub]", or download it and give the local path'
        ) from error
    return huggingface_hub


def _download_model(hub: Any, id_: HubId, path: str) -> Path:
    """Fetches what `_wanted` names, all of one commit."""
    info = hub.HfApi().model_info(id_.repo, revision=id_.revision)
    names = [sibling.rfilename for sibling in info.siblings]
    if path.endswith(_FILES):
        return _download_first(hub, id_, path, info.sha)
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
        return _download_first(hub, id_, prefix + files[0], info.sha)
    downloaded = _download_first(hub, id_, prefix + best.name, info.sha)
    if best.sharded:
        for shard in sorted(set(read_weight_map(downloaded).values())):
            hub.hf_hub_download(id_.repo, prefix + shard, revision=info.sha)
        return downloaded.parent
    return downloaded


def _download_first(hub: Any, id_: HubId, name: str, commit: str) -> Path:
    """The first file of a download.

    Asked for by branch or tag, so that the cache notes which commit that is and finds it offline.
    """
    path = Path(hub.hf_hub_download(id_.repo, name, revision=id_.revision))
    if commit in path.parts:
        return path
    return Path(hub.hf_hub_download(id_.repo, name, revision=commit))  # changed in between


def _find_model_folder(names: list[str], path: str, id_: HubId) -> str:
    """The folder with the weights, "" for the root."""
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


def is_hub_address(text: str) -> bool:
    """Whether a text begins with `hf://`."""
    return _SCHEME.match(text) is not None


def fetch_adapters(address: str) -> list[Path]:
    """The local folders of a repository's adapters, or of those of a collection of repositories.

    Only .safetensors files and the configurations of adapters are fetched, unless the hub's cache
    has them.

    Args:
        address: `hf://org/name[@revision][/folder]` or `hf://collections/org/slug`.

    Raises:
        UnsupportedFormat: `huggingface_hub` is not installed, or the hub does not give it.
    """
    collection = re.fullmatch(r"hf://?collections/([^/]+/[^/]+)", address)
    id_ = None if collection else parse_hub_id(address)
    hub = _import_hub(id_ or HubId(address))
    try:
        if collection:
            items = hub.HfApi().get_collection(collection[1]).items
            ids = [HubId(item.item_id) for item in items if item.item_type == "model"]
        else:
            ids = [id_] if id_ else []
        return [_fetch_adapter(hub, one) for one in ids]
    # Which errors the hub's client raises depends on its version and on that of its HTTP library.
    except Exception as error:
        raise UnsupportedFormat(f"{address}: the Hugging Face Hub {_explain_hub(error)}") from error


def _fetch_adapter(hub: Any, id_: HubId) -> Path:
    """The local folder of a repository, with the files that an adapter can be."""
    start = f"{id_.path}/" if id_.path else ""
    folder = hub.snapshot_download(
        id_.repo,
        revision=id_.revision,
        allow_patterns=[f"{start}*.safetensors", f"{start}*adapter_config.json"],
        local_files_only=bool(hub.constants.HF_HUB_OFFLINE),
    )
    return Path(folder) / id_.path
