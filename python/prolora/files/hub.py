"""Ids on the Hugging Face Hub: how they are written, and how files are asked for there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..errors import HubUnavailable, MissingFile, ProLoRAError, UnsupportedFormat

# A `Path` made of "hf://org/name" has lost the second slash.
_SCHEME = re.compile(r"hf://?(?=[^/])")
_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:@([\w.-]+))?")
WEIGHT_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that hold weights."""
_NO_ID = (*WEIGHT_FILES, ".sft", ".json", ".txt", ".tsv", ".list", ".zip")
_START = "no such file or folder, and the Hugging Face Hub"
_UNREACHED = {"ConnectError", "ConnectionError", "TimeoutException", "Timeout"}
_UNCACHED = "LocalEntryNotFoundError"
_GATED = "GatedRepoError"
_ABSENT = {
    "RevisionNotFoundError": "has no such revision",
    "RepositoryNotFoundError": "has no such repository, or a private one: `hf auth login` logs in",
    "EntryNotFoundError": "has no such file in it",
}


@dataclass(frozen=True)
class HubId:
    """A model on the hub."""

    repo: str  # "org/name"
    revision: str | None = None  # branch, tag or commit; None for the default branch
    path: str = ""  # a file or folder in it, "" for the whole

    @property
    def name(self) -> str:
        """What reports call a base, and messages a LoRA."""
        return "/".join(filter(None, (self.repo, self.path)))

    def spell(self, path: str) -> str:
        """Returns the address of a file or folder of the same repository."""
        return f"hf://{self.repo}{f'@{self.revision}' if self.revision else ''}/{path}"


def parse_hub_id(source: str) -> HubId | None:
    """Reads `org/name[@revision]` and `hf://org/name[@revision][/path]`, None for anything else.

    A name that looks like a file, or that lies in an existing folder, is a path.

    Raises:
        UnsupportedFormat: it begins with `hf://` and goes on otherwise.
    """
    scheme = _SCHEME.match(source)
    if scheme is None:
        match = _ID.fullmatch(source)
        # os.path answers "no" where a path cannot be looked at, as one that is too long.
        if not match or source.lower().endswith(_NO_ID) or os.path.isdir(os.path.dirname(source)):
            return None
        return HubId(match[1], match[2])
    match = _ID.match(source, scheme.end())
    rest = source[match.end() :] if match else ""
    if match is None or (rest and not rest.startswith("/")) or ".." in rest.split("/"):
        raise UnsupportedFormat(
            f"{spell_path(source)}: a hub id is hf://org/name[@revision][/path]"
        )
    return HubId(match[1], match[2], rest.strip("/"))


def find_hub_id(source: str | os.PathLike[str]) -> HubId | None:
    """Returns a path's hub id; None for existing paths and for other texts.

    Raises:
        UnsupportedFormat: as `parse_hub_id`.
    """
    return None if os.path.exists(source) else parse_hub_id(_write_slashes(source))


def is_broken_id(source: str | os.PathLike[str]) -> bool:
    """Recognises `hf://` without a valid id; its reader explains the form."""
    try:
        find_hub_id(source)
    except UnsupportedFormat:
        return True
    return False


def _write_slashes(path: str | os.PathLike[str]) -> str:
    """Returns a path as text, with an id's slashes on Windows too."""
    return path.as_posix() if isinstance(path, PurePath) else os.fspath(path)


def spell_path(path: str | os.PathLike[str]) -> str:
    """Returns a path as text; restores the slashes that an id lost in a `Path`."""
    text = _write_slashes(path)
    if scheme := _SCHEME.match(text):
        return f"hf://{text[scheme.end() :]}"
    return text if find_hub_id(path) else os.fspath(path)


def keep_path(source: str | os.PathLike[str]) -> Path:
    """Makes a `Path` of a text, so that `./a/b` does not become an id."""
    path = Path(source)
    is_marked = isinstance(source, str) and not (_ID.fullmatch(source) or os.path.exists(source))
    return Path(os.path.abspath(path)) if is_marked and _ID.fullmatch(path.as_posix()) else path


def is_hub_address(text: str) -> bool:
    """Returns whether a text begins with `hf://`."""
    return _SCHEME.match(text) is not None


@contextmanager
def ask_hub(name: str) -> Iterator[Any]:
    """Yields the hub's client, and turns its errors into prolora's.

    Raises:
        MissingFile: `huggingface_hub` is not installed, or the hub does not have `name`.
        HubUnavailable: the hub may have it, and does not give it.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants  # a submodule, loaded only when asked for
    except ImportError as error:
        raise MissingFile(
            f"{name}: no such file or folder. If it is a model on the Hugging Face Hub, "
            "pip install huggingface_hub, or download it and give the local path"
        ) from error
    try:
        yield huggingface_hub
    except ProLoRAError:
        raise
    # The hub client's errors depend on its version and on its HTTP library's.
    except Exception as error:
        raise _explain_hub(name, error, bool(constants.HF_HUB_OFFLINE)) from error


def not_cached(name: str) -> HubUnavailable:
    """Makes the error of a file missing in the cache while offline."""
    return HubUnavailable(
        f"{name}: {_START} is not asked (HF_HUB_OFFLINE is set); its cache on this machine lacks it"
    )


def _explain_hub(name: str, error: Exception, is_offline: bool) -> MissingFile:
    """Translates an error of the hub's client by its class name.

    The classes depend on the client's version.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    start = f"{name}: {_START}"
    if is_offline and _UNCACHED in kinds:
        return not_cached(name)
    if kinds & {*_UNREACHED, _UNCACHED}:
        return HubUnavailable(
            f"{start} cannot be reached (no network?); give a local file or folder "
            "(HF_HUB_OFFLINE=1: the hub is not asked)"
        )
    if _GATED in kinds:
        return HubUnavailable(
            f"{start} gives it to those alone whom its owner lets in: ask on its page, then log in "
            "(`hf auth login`)"
        )
    for kind, words in _ABSENT.items():
        if kind in kinds:
            return MissingFile(f"{start} {words}")
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return HubUnavailable(f"{start} does not give it: {first_line}")


def list_hub_files(hub: Any, id_: HubId) -> tuple[list[str], str]:
    """Returns the files of a repository, and the commit that has them."""
    info = hub.HfApi().model_info(id_.repo, revision=id_.revision)
    return [sibling.rfilename for sibling in info.siblings], info.sha


def find_snapshot(hub: Any, id_: HubId) -> Path:
    """Returns the local cache's folder of a repository."""
    return Path(hub.snapshot_download(id_.repo, revision=id_.revision, local_files_only=True))


def download_files(hub: Any, id_: HubId, names: list[str], commit: str) -> list[Path]:
    """Files of one commit, downloaded unless the cache has them.

    The first is asked for by branch or tag, so that the cache notes which commit that is and finds
    it offline.
    """
    path = Path(hub.hf_hub_download(id_.repo, names[0], revision=id_.revision))
    if commit not in path.parts:  # changed in between
        path = Path(hub.hf_hub_download(id_.repo, names[0], revision=commit))
    rest = [Path(hub.hf_hub_download(id_.repo, x, revision=commit)) for x in names[1:]]
    return [path, *rest]
