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
        """What reports call a base, and messages a LoRA."""
        return "/".join(filter(None, (self.repo, self.path)))

    def spell(self, path: str) -> str:
        """The address of a file or folder of the same repository."""
        return f"hf://{self.repo}{f'@{self.revision}' if self.revision else ''}/{path}"


def parse_hub_id(source: str) -> HubId | None:
    """Reads `org/name[@revision]` and `hf://org/name[@revision][/path]`, None for anything else.

    A name that looks like a file, or that lies in a folder that exists here, is a path.

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
    """The id that a path is; None where something lies there, or it is none.

    Raises:
        UnsupportedFormat: as `parse_hub_id`.
    """
    return None if os.path.exists(source) else parse_hub_id(_write_slashes(source))


def is_broken_id(source: str | os.PathLike[str]) -> bool:
    """Whether it begins with `hf://` and is no id; its reader says how one is written."""
    try:
        find_hub_id(source)
    except UnsupportedFormat:
        return True
    return False


def _write_slashes(path: str | os.PathLike[str]) -> str:
    """A path as text; a `Path` has the slashes of an id also where Windows writes backslashes."""
    return path.as_posix() if isinstance(path, PurePath) else os.fspath(path)


def spell_path(path: str | os.PathLike[str]) -> str:
    """A path as text; an id gets back the slashes that a `Path` of it has lost or turned."""
    text = _write_slashes(path)
    if scheme := _SCHEME.match(text):
        return f"hf://{text[scheme.end() :]}"
    return text if find_hub_id(path) else os.fspath(path)


def keep_path(source: str | os.PathLike[str]) -> Path:
    """A `Path`; a text marked as one, as `./a/b` or `a/b/`, does not become an id by it."""
    path = Path(source)
    is_marked = isinstance(source, str) and not (_ID.fullmatch(source) or os.path.exists(source))
    return Path(os.path.abspath(path)) if is_marked and _ID.fullmatch(path.as_posix()) else path


def is_hub_address(text: str) -> bool:
    """Whether a text begins with `hf://`."""
    return _SCHEME.match(text) is not None


@contextmanager
def ask_hub(name: str) -> Iterator[Any]:
    """The hub's client, whose errors become those of prolora.

    Args:
        name: of what is asked for.

    Raises:
        MissingFile: `huggingface_hub` is not installed, or the hub does not have it.
        HubUnavailable: the hub has it perhaps, and does not give it.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants  # a submodule, loaded only when asked for
    except ImportError as error:
        raise MissingFile(
            f"{name}: no such file or folder. If it is a model on the Hugging Face Hub, "
            'pip install "prolora[hub]", or download it and give the local path'
        ) from error
    try:
        yield huggingface_hub
    except ProLoRAError:
        raise
    # Which errors the hub's client raises depends on its version and on that of its HTTP library.
    except Exception as error:
        raise _explain_hub(name, error, bool(constants.HF_HUB_OFFLINE)) from error


def not_cached(name: str) -> HubUnavailable:
    """The error of what the cache of this machine lacks, where the hub may not be asked."""
    return HubUnavailable(
        f"{name}: {_START} is not asked (HF_HUB_OFFLINE is set); its cache on this machine lacks it"
    )


def _explain_hub(name: str, error: Exception, is_offline: bool) -> MissingFile:
    """An error of the hub's client, which goes by names: its classes depend on its version."""
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
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return HubUnavailable(f"{start} does not give it: {said}")


def list_hub_files(hub: Any, id_: HubId) -> tuple[list[str], str]:
    """The files of a repository, and the commit that has them."""
    info = hub.HfApi().model_info(id_.repo, revision=id_.revision)
    return [sibling.rfilename for sibling in info.siblings], info.sha


def find_snapshot(hub: Any, id_: HubId) -> Path:
    """What the cache on this machine has of a repository."""
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
