"""Moved LoRAs onto the Hugging Face Hub, with the card that says how they were made."""

from __future__ import annotations

import re
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import InvalidOption, UnsupportedFormat
from .publication import copy_uploads, list_uploads

_REPO = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def push(
    path: str | PathLike[str], repo: str, *, private: bool = True, message: str | None = None
) -> str:
    """Uploads moved LoRAs and their card in one commit; the repository is made if there is none.

    Nothing but these files is uploaded: the LoRA files, the configuration of a PEFT folder, the
    card and pages of reports that stand beside them under their names. Headers go up without what
    is nobody's business (image folders, comments, paths); `publication.list_uploads` says what
    goes up.

    Args:
        path: a file that prolora wrote, a PEFT folder, or a folder of such files.
        repo: "org/name" on the hub.
        private: whether a new repository is private; one that exists stays as it is.
        message: of the commit; None names the files.

    Returns:
        The address of the commit.

    Raises:
        OutputError: there is no card, nothing that prolora moved, a link, or a page that names a
            folder of this machine.
        InvalidOption: the name of the repository is none.
        UnsupportedFormat: `huggingface_hub` is not installed, or the hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise InvalidOption(f"repo must be a name on the hub as org/name, not {repo!r}")
    uploads = list_uploads(Path(path))
    hub = _import_hub()
    names = [upload.file.name for upload in uploads if upload.header is not None]
    words = message or f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}, moved by prolora"
    api = hub.HfApi(library_name="prolora")
    with tempfile.TemporaryDirectory(prefix="prolora-") as folder:
        operations = [
            hub.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file))
            for file in copy_uploads(uploads, Path(folder))
        ]
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.create_commit(repo, operations, commit_message=words)
        # Which errors the hub's client raises depends on its version and its HTTP library's.
        except Exception as error:
            raise UnsupportedFormat(f"{repo}: the hub does not take it: {error}") from error
    return str(commit.commit_url)


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnsupportedFormat(
            'uploading needs the client of the hub: pip install "prolora[hub]"'
        ) from error
    return huggingface_hub
