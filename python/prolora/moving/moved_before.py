"""LoRAs that prolora moved before, and their bases.

A moved LoRA belongs on the base that it was moved to, and on no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..adapters.adapter import Adapter
from ..adapters.formats.moves import Move, describe_moves, read_moves
from ..adapters.lora import Lora
from ..bases import Base
from ..bases.cache.basis_cache import BasisCache
from ..bases.identity import is_identical
from ..errors import AlreadyMoved
from .options import LoraLike, TransferOptions, begin_message

# Words of file names for the form in which a model is stored, not for the model.
_FORMS = re.compile(
    r"safetensors|gguf|diffusers|b?fp?(?:8|16|32)|float(?:8|16|32)|half|int8|scaled|e4m3(?:fn)?|e5m2"
    r"|pruned|emaonly|ema|noema"
)
_QUANTISED = re.compile(r"(?<![a-z0-9])i?q\d(?:_[a-z0-9]+)*")  # GGUF's Q4_K_M and the like
_NO_HASHES = "a file, a folder and a model in memory have no hashes to compare"
# Names of folders and objects that any model may have.
NAMED_BASE = "base_model_name_or_path"
"""Where PEFT's configuration names the base."""
_ANY_MODEL = {"unet", "transformer", "transformer 2", "model", "diffusion pytorch model", ""}


def check_moved_before(
    lora: LoraLike, source: Base, options: TransferOptions, cache: BasisCache | None = None
) -> str:
    """Refuses to move a LoRA on from a base that it does not belong to; returns what is doubtful.

    The header of a result names the base that it was moved to, with its hash. A renamed file is the
    same base. A file with the same name and another hash may be the base in another precision: it
    is accepted, and it is said what was compared.

    Args:
        lora: what is to be moved; its header alone is read.
        source: the base it is said to belong to; hashed only where the LoRA was moved before.
        options: `again` accepts any base.
        cache: remembers the hashes of files.

    Raises:
        AlreadyMoved: it was moved to another base.
        UnsupportedFormat: the LoRA cannot be read.
    """
    metadata = read_header(lora)
    moves = read_moves(metadata)
    if not moves or options.again:
        return ""
    last = moves[-1]
    reason, doubt = _explain_other_base(last, source, metadata.get("ss_sd_model_hash"), cache)
    if reason is None:
        return doubt
    raise AlreadyMoved(
        f"{begin_message(lora)}this LoRA was already moved {describe_moves(moves)}, but the source "
        f"is {source.name}, {reason}; give {last.target} as the source, or take `again=True` to "
        "move it all the same"
    )


def find_newer_base(metadata: Mapping[str, str], base: str) -> str:
    """Returns the base that a LoRA was moved to last from this one.

    "" for none; the names must be equal.
    """
    moves = read_moves(metadata)
    if not moves or moves[-1].source != base:
        return ""
    old, new = fold_base_name(base), fold_base_name(moves[-1].target)
    return "" if new == old or old in _ANY_MODEL else moves[-1].target


def read_header(lora: LoraLike) -> Mapping[str, str]:
    """Reads a LoRA's header and PEFT's base name; a state dict has none."""
    if isinstance(lora, Adapter):
        return lora.metadata
    if isinstance(lora, Mapping):
        return {}
    opened = Lora.open(lora)
    named = (opened.config or {}).get(NAMED_BASE)
    return {NAMED_BASE: named} | opened.metadata if isinstance(named, str) else opened.metadata


def _explain_other_base(
    last: Move, source: Base, short_hash: str | None, cache: BasisCache | None
) -> tuple[str | None, str]:
    """Explains why a base is not the LoRA's last one, or doubts it.

    The first is None if it may be that base.
    """
    memory = cache.folder if cache else None
    same = is_identical(source, last.target_hash, short_hash, memory)
    named = fold_base_name(source.name)
    if same and (named == fold_base_name(last.target) or not last.target_hash.startswith("hint:")):
        return None, ""
    if same:
        return None, (
            f"The LoRA was moved to {last.target}; {source.name} has its size and equal pieces, so "
            "it is taken for the same model."
        )
    told_by_name = fold_base_name(last.target) not in (fold_base_name(last.source), *_ANY_MODEL)
    if told_by_name and named == fold_base_name(last.target):
        told = "another hash" if same is False else "no hash to compare"
        return None, (
            f"The LoRA was moved to {last.target}; {source.name} has that name and {told}, so it "
            "is taken for the same model."
        )
    if same is False:
        if source.name == last.source:
            return ("the base that it was moved from" if told_by_name else "another file"), ""
        known = "by name and hash" if told_by_name else "by its hash"
        return f"another model {known}", ""
    if not told_by_name or named in _ANY_MODEL or not source.files:
        return None, (
            f"The LoRA was moved to {last.target}; whether {source.name} is that model cannot be "
            f"told: {_NO_HASHES}."
        )
    if source.name == last.source:
        return "the base that it was moved from", ""
    return f"another model by its name ({_NO_HASHES})", ""


def fold_base_name(name: str) -> str:
    """Folds a base's name: no folders, case or words for its storage."""
    plain = _QUANTISED.sub("", re.split(r"[/\\]", name)[-1].lower())
    words = re.split(r"[\s._-]+", plain)
    return " ".join(word for word in words if word and not _FORMS.fullmatch(word))
