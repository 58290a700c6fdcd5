"""What a result was made of and how, in its own header: a run that was cut off goes on there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters import outline_adapter
from ..adapters.contents import parse_contents
from ..adapters.folder import ADAPTER_FILES, PEFT_WEIGHTS
from ..adapters.hub import locate_adapter
from ..adapters.left_out import find_unknown_updates
from ..adapters.unread import open_adapter
from ..adapters.writing import has_own_config
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import compute_identity
from ..comparison.module_map import Matching
from ..core.option_fields import read_shown
from ..errors import ProLoRAError, input_error
from ..files.hashing import hash_parts, hash_text, read_blocks
from ..files.ownership import is_own
from ..version import __version__
from .by_weights.rows import list_missed
from .fit_options import FitOptions
from .options import TransferOptions

# Entries of a result's header.
_LORA_HASH, _RECIPE = "prolora.lora_hash", "prolora.recipe"
_FORM = ("format", "dtype")  # stand at the end, as in results of earlier versions


@dataclass(frozen=True)
class Recipe:
    """What determines a result: equal for equal inputs, options and version, and else different.

    Attributes:
        lora: a file or folder.
        source: the base it was trained on.
        target: the base it moves to.
        options: as they were asked for.
        lora_hash: "sha256:…" of the LoRA.
    """

    lora: Path
    source: Base
    target: Base
    options: TransferOptions | FitOptions
    lora_hash: str

    @classmethod
    def of(
        cls, lora: Path, source: Base, target: Base, options: TransferOptions | FitOptions
    ) -> Recipe:
        """The recipe of a LoRA that is not yet read: a file that changes later has another one.

        Raises:
            UnsupportedFormat: the LoRA cannot be read.
        """
        open_adapter(lora)  # its header first: who hashes 100 GB of zeros waits for nothing
        return cls(lora, source, target, options, f"sha256:{hash_adapter(lora)}")

    def describe(self, cache: BasisCache) -> dict[str, str]:
        """The two entries of a result's header.

        Args:
            cache: remembers the hashes of files.
        """
        chosen = {
            field.name: _jsonable(getattr(self.options, field.name))
            for field in fields(self.options)
            if read_shown(field).decides and field.name not in _FORM
        }
        bases = [compute_identity(b, cache) or b.name for b in (self.source, self.target)]
        form = (self.options.format, str(self.options.dtype))
        text = json.dumps([__version__, bases, chosen, *form], sort_keys=True)
        return {"lora_hash": self.lora_hash, "recipe": f"sha256:{hash_text(text)}"}

    def digest(self, cache: BasisCache) -> str:
        """Twelve digits that tell the result from all others.

        Args:
            cache: remembers the hashes of files.
        """
        return _shorten(*self.describe(cache).values())

    def is_made(self, out: Path, cache: BasisCache) -> bool:
        """Whether `out` is a result of this recipe as it was written: by its header and its mark.

        The bases are hashed only where the result was made of this very LoRA. Bases in memory have
        no hash by which they could be known again.
        """
        if not (self.source.files and self.target.files):
            return False
        try:
            result = open_adapter(out)
            parse_contents(result)  # in a folder, weights and configuration go together
            metadata = result.metadata
        except ProLoRAError:
            return False
        if metadata.get(_LORA_HASH) != self.lora_hash:
            return False
        if metadata.get(_RECIPE) != self.describe(cache)["recipe"]:
            return False
        # Who trained it on, or changed a key, may have kept the header.
        return is_intact(out)

    def list_unread(self) -> tuple[str, ...]:
        """Updates of the LoRA that stay behind because they cannot be read, as its header tells.

        Raises:
            ProLoRAError: the LoRA cannot be read.
        """
        base = self.source
        outline = outline_adapter(self.lora, base.shapes, base.family, headers_only=True)
        unknown = find_unknown_updates(outline.left_out)
        return (*list_missed(outline, self.options.text_encoder), *unknown)


def _shorten(lora_hash: str, recipe: str) -> str:
    """The digits that stand for a recipe in a result's name."""
    return hash_parts([lora_hash, recipe])[:12]


def is_intact(out: Path) -> bool:
    """Whether a result is as it was written, every byte of it.

    Raises:
        OSError: it cannot be read.
    """
    if out.is_dir():
        return is_own(out / PEFT_WEIGHTS, "LoRA") and has_own_config(out)
    return is_own(out, "LoRA")


def explain_damage(out: Path) -> str:
    """Why a result that has the digits of its recipe in its name is not what it was; "" if it is.

    Nothing but the result is read, every byte of it.
    """
    try:
        metadata = open_adapter(out).metadata
        if _shorten(metadata.get(_LORA_HASH, ""), metadata.get(_RECIPE, "")) not in out.name:
            return "it is made of something else than its name says"
        return "" if is_intact(out) else "its bytes are not those that were written"
    except (ProLoRAError, OSError) as error:
        return str(error)


def _jsonable(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, Matching):
        return "similarity"  # which the two bases determine
    if isinstance(value, Mapping):
        pairs = {str(key): _jsonable(item) for key, item in value.items()}
        # Of block weights the last name that fits decides; of a map the order is nothing.
        return pairs if all(isinstance(x, str) for x in pairs.values()) else list(pairs.items())
    if isinstance(value, PathLike) or (isinstance(value, str) and value.endswith(".json")):
        return hash_adapter(Path(value)) if Path(value).exists() else str(value)
    return value if isinstance(value, str | int | float | None) else repr(value)


def hash_adapter(path: Path) -> str:
    """SHA-256 of a LoRA's file, or of the files of its folder; it may be an id on the hub.

    Raises:
        UnsupportedFormat: one of them cannot be read.
    """
    path = locate_adapter(path)
    try:
        files = [path / name for name in ADAPTER_FILES] if path.is_dir() else [path]
        return hash_parts(block for file in files if file.is_file() for block in read_blocks(file))
    except (OSError, ValueError) as error:
        raise input_error(path, error) from error
