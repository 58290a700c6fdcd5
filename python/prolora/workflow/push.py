"""Moved LoRAs onto the Hugging Face Hub, with the card that says how they were made."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.formats.moves import read_moves
from ..adapters.unread import PEFT_CONFIG, PEFT_WEIGHTS, open_adapter
from ..errors import InvalidOption, OutputError, UnsupportedFormat
from .card import CARD, MARK

_REPO = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def push(
    path: str | PathLike[str], repo: str, *, private: bool = True, message: str | None = None
) -> str:
    """Uploads moved LoRAs and their card in one commit; the repository is made if there is none.

    Nothing but these files is uploaded: the LoRA files, the configuration of a PEFT folder, the
    card and pages of reports that stand beside them under their names.

    Args:
        path: a file that prolora wrote, a PEFT folder, or a folder of such files.
        repo: "org/name" on the hub.
        private: whether a new repository is private; one that exists stays as it is.
        message: of the commit; None names the files.

    Returns:
        The address of the commit.

    Raises:
        OutputError: there is no card, or nothing that prolora moved.
        InvalidOption: the name of the repository is none.
        UnsupportedFormat: `huggingface_hub` is not installed, or the hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise InvalidOption(f"repo must be a name on the hub as org/name, not {repo!r}")
    files = list_files(Path(path))
    hub = _import_hub()
    names = [file.name for file in files if file.suffix == ".safetensors"]
    words = message or f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}, moved by prolora"
    operations = [
        hub.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files
    ]
    api = hub.HfApi(library_name="prolora")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=words)
    # Which errors the hub's client raises depends on its version and on that of its HTTP library.
    except Exception as error:
        raise UnsupportedFormat(
            f"{repo}: the hub does not take it: {type(error).__name__}: {error}"
        ) from error
    return str(commit.commit_url)


def list_files(path: Path) -> list[Path]:
    """What `push` uploads.

    Raises:
        OutputError: there is no card of prolora, or nothing that prolora moved.
    """
    folder = path if path.is_dir() else path.parent
    candidates = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    loras = [file for file in candidates if file.is_file()]
    if not loras:
        raise OutputError(f"{path}: no .safetensors file there")
    for file in loras:
        opened = open_adapter(folder if file.name == PEFT_WEIGHTS else file)
        if not read_moves(opened.metadata):
            raise OutputError(f"{file}: was not written by prolora, so it is not uploaded")
    card = folder / CARD
    if not card.is_file() or MARK not in card.read_text("utf-8", errors="replace"):
        raise OutputError(
            f"{card}: no model card of prolora; `prolora transfer … --card` writes one"
        )
    beside = [file.with_suffix(".html") for file in loras]
    config = [folder / PEFT_CONFIG] if any(f.name == PEFT_WEIGHTS for f in loras) else []
    return [card, *loras, *(file for file in (*config, *beside) if file.is_file())]


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnsupportedFormat(
            'uploading needs the client of the hub: pip install "prolora[hub]"'
        ) from error
    return huggingface_hub
