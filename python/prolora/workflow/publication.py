"""Moved LoRAs as they may be published: only prolora's own files, and nothing private in them.

A header says more than a reader needs: names of image folders, comments, paths. So its keys are
those of a list, and no folder stays in what they say.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..adapters.folder import PEFT_CONFIG, PEFT_WEIGHTS
from ..adapters.formats.metadata import SPECIFIED_HASH, compute_hashes
from ..adapters.formats.moves import PREFIX, read_moves
from ..adapters.formats.peft_config import METADATA_KEY
from ..errors import OutputError, output_error
from ..files.hashing import hash_file
from ..files.jsontext import read_json_object
from ..files.ownership import is_own, make_mark
from ..files.safetensors_file import SafetensorsFile
from ..files.writing import write_safetensors, write_text_atomically
from .card import CARD, MARK

# What programs need of a header, and what is made to be read by everybody.
_PUBLIC_PREFIXES = (PREFIX, "modelspec.")
_PUBLIC_KEYS = {
    METADATA_KEY,
    "format",
    "ss_base_model_version",
    "ss_network_alpha",
    "ss_network_dim",
    "ss_network_module",
    "ss_new_sd_model_hash",
    "ss_sd_model_hash",
    "ss_sd_model_name",
    "ss_v2",
    "sshs_legacy_hash",
    "sshs_model_hash",
}
# A folder of a machine: from the root, a drive, a share or the home, and at least two names long.
_FOLDER = r"(?:~|[A-Za-z]:|file://|\\\\[\w.-]+)?(?:[/\\]+[^\s/\\\"'`<>|*?,;:()\[\]{}]+)"
_PRIVATE = re.compile(
    rf"(?<![\w/\\.:~-])(?:{_FOLDER}{{2,}}|(?:~|[A-Za-z]:)[/\\]+[^\s\"'`<>|]+)"
    r"|[\w.+-]+@[\w-]+\.[\w.]+"
)


@dataclass(frozen=True)
class Upload:
    """A file as it is published.

    Attributes:
        file: where it is.
        header: the metadata that is sent; None where it is no LoRA.
        removed: the keys of its header that are not sent.
        private: folders and addresses that its text names all the same.
    """

    file: Path
    header: Mapping[str, str] | None = None
    removed: tuple[str, ...] = ()
    private: tuple[str, ...] = ()

    def copy_into(self, folder: Path, digests: Mapping[str, str]) -> Path:
        """Writes the file as it is published.

        Args:
            folder: of the copy.
            digests: of files, each with that of its copy, for the texts that name them.
        """
        copy = folder / self.file.name
        if self.header is not None:
            opened = SafetensorsFile(self.file)
            tensors, header = opened.read_all(), dict(self.header)
            if header == opened.metadata:
                shutil.copyfile(self.file, copy)
                return copy
            if "sshs_model_hash" in header or SPECIFIED_HASH in header:
                hashes = compute_hashes(tensors, header)
                header |= {key: text for key, text in hashes.items() if key in header}
            write_safetensors(copy, tensors, header)
            return copy
        text = self.file.read_text("utf-8", errors="replace")
        if self.file.name == CARD:
            for old, new in digests.items():
                text = text.replace(old, new)
            if is_own(self.file, "card"):
                mark = make_mark("card")
                text = re.sub(rf"{mark.rstrip('0')}[0-9a-f]{{64}}", mark, text, count=1)
        write_text_atomically(copy, text)
        return copy


def list_uploads(path: Path) -> list[Upload]:
    """What is published of a moved LoRA, or of a folder of them: card, LoRAs, their pages.

    Raises:
        OutputError: there is no card, a LoRA or a page is not prolora's, a file is a link, or one
            other than the card names a folder of this machine.
    """
    folder = path if path.is_dir() else path.parent
    loras = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    loras = [file for file in loras if file.is_symlink() or file.is_file()]
    if not loras:
        raise OutputError(f"{path}: no .safetensors file there to publish")
    beside = [file.with_suffix(".html") for file in loras]
    config = [folder / PEFT_CONFIG] if any(f.name == PEFT_WEIGHTS for f in loras) else []
    card = folder / CARD
    present = [file for file in (*config, *beside) if file.is_symlink() or file.is_file()]
    try:
        for file in (card, *loras, *present):
            _refuse_link(file)
        if not card.is_file() or MARK not in card.read_text("utf-8", errors="replace"):
            raise OutputError(
                f"{card}: no model card that prolora wrote is there, and what is published needs "
                "one; move the LoRA again and ask for a card"
            )
        return [_publish_text(card), *map(_publish_lora, loras), *map(_publish_text, present)]
    except OSError as error:
        raise output_error(path, error, "cannot be read") from error


def copy_uploads(uploads: Iterable[Upload], folder: Path) -> list[Path]:
    """Writes all files as they are published; texts name the digests of the published LoRAs."""
    uploads, copies = list(uploads), dict[Path, Path]()
    digests: dict[str, str] = {}
    for upload in sorted(uploads, key=lambda upload: upload.header is None):
        copy = upload.copy_into(folder, digests)
        copies[upload.file] = copy
        if upload.header is not None:
            digests[hash_file(upload.file)] = hash_file(copy)
    return [copies[upload.file] for upload in uploads]


def find_private(text: str) -> tuple[str, ...]:
    """The folders of a machine and the addresses of people that a text names, each once."""
    return tuple(dict.fromkeys(match[0] for match in _PRIVATE.finditer(text)))


def drop_folders(text: str) -> str:
    """A text in which folders are gone, and the names of the files in them have stayed."""
    if _PRIVATE.match(text):  # a path as a whole, in which there may be spaces
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return _PRIVATE.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def _publish_lora(file: Path) -> Upload:
    metadata = SafetensorsFile(file).metadata
    if not read_moves(metadata) or not is_own(file, "LoRA"):
        raise _not_ours(file)
    sent = {key: drop_folders(text) for key, text in metadata.items() if _is_public(key)}
    removed = tuple(key for key in metadata if key not in sent)
    return Upload(file, sent, removed, find_private(" \n".join(sent.values())))


def _publish_text(file: Path) -> Upload:
    if file.name == PEFT_CONFIG:
        read_json_object(file)
    if file.suffix == ".html" and not is_own(file, "report"):
        raise _not_ours(file)
    text = file.read_text("utf-8", errors="replace")
    if file.suffix == ".html":
        text = re.sub(r"(?s)<(style|script)>.*?</\1>|<[^>]*>", " ", text)
        text = html.unescape(text)
    private = find_private(text)
    if private and file.name != CARD:  # which its author has read, and may have edited
        raise OutputError(f"{file}: names {private[0]}, so it is not uploaded; remove it")
    return Upload(file, private=private)


def _not_ours(file: Path) -> OutputError:
    return OutputError(
        f"{file}: was not written by prolora, or was changed since, so it is not uploaded; move it "
        "out of the folder"
    )


def _is_public(key: str) -> bool:
    return key in _PUBLIC_KEYS or key.startswith(_PUBLIC_PREFIXES)


def _refuse_link(file: Path) -> None:
    """A link may lead to a file that nobody means to publish."""
    if file.is_symlink():
        raise OutputError(f"{file}: is a link, so it is not uploaded; put the file itself there")
