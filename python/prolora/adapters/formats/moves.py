"""The moves that a LoRA's header records: from which base to which."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

PREFIX = "prolora."
EARLIER = "earlier_moves"
"""The entry, after `PREFIX`, that lists all moves but the last; absent after a first move."""
MOST_EARLIER = 64
"""How many earlier moves are kept, the latest: more were never made, and a header is anybody's."""
MERGE = "merge"
"""What headers call the making of a merged LoRA."""
_LONGEST = 1 << 20
# Words of file names for the form in which a model is stored, not for the model.
_FORMS = re.compile(
    r"safetensors|gguf|diffusers|b?fp?(?:8|16|32)|float(?:8|16|32)|half|int8|scaled|e4m3(?:fn)?|e5m2"
    r"|pruned|emaonly|ema|noema"
)
_QUANTISED = re.compile(r"(?<![a-z0-9])i?q\d(?:_[a-z0-9]+)*")  # GGUF's Q4_K_M and the like
ANY_MODEL = {"unet", "transformer", "transformer 2", "model", "diffusion pytorch model", ""}
ANY_MODEL |= {"the source", "the target"}  # in memory
"""Names of folders and objects that any model may have."""


@dataclass(frozen=True)
class Move:
    """One move of a LoRA between two bases; "" where the header is silent."""

    source: str = ""  # name of the base that it was moved from
    target: str = ""  # name of the base that it was moved to
    # Which files the source was, as `bases.identity` tells it
    source_hash: str = ""
    target_hash: str = ""  # which files the target was
    method: str = ""  # how it was moved
    version: str = ""  # of the prolora that moved it

    def is_continued_by(self, other: Move) -> bool:
        """Returns whether another move starts at this one's target."""
        if self.target_hash and other.source_hash:
            return self.target_hash == other.source_hash
        return self.target == other.source


_FIELDS = tuple(field.name for field in fields(Move))


def read_moves(metadata: Mapping[str, str]) -> tuple[Move, ...]:
    """Reads the moves that made a file, oldest first; empty without any.

    Anyone may have written the header: what is not understood counts as absent, and so does a list
    of moves of more than a megabyte.
    """
    last = Move(**{name: metadata.get(PREFIX + name, "") for name in _FIELDS})
    if not last.target:
        return ()
    try:
        stored = metadata.get(PREFIX + EARLIER, "[]")
        listed = json.loads(stored) if len(stored) <= _LONGEST else []
    except (ValueError, RecursionError):
        listed = []
    earlier = [
        Move(**{name: text for name in _FIELDS if isinstance(text := entry.get(name), str)})
        for entry in (listed[-MOST_EARLIER:] if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("target"), str)
    ]
    return (*earlier, last)


def read_provenance(metadata: Mapping[str, str]) -> dict[str, str]:
    """Reads how prolora made a file, without the prefix of the keys."""
    return {
        key.removeprefix(PREFIX): text for key, text in metadata.items() if key.startswith(PREFIX)
    }


def write_moves(moves: Sequence[Move]) -> dict[str, str]:
    """Returns the entry, without its prefix, that keeps moves in the next header."""
    if not moves:
        return {}
    listed = [{key: text for key, text in asdict(move).items() if text} for move in moves]
    return {EARLIER: json.dumps(listed, ensure_ascii=False)}


def describe_moves(moves: Sequence[Move]) -> str:
    """Describes a LoRA's way in words: "from A to B to C".

    "then from X" marks a gap.
    """
    text = ""
    for before, move in zip((None, *moves), moves, strict=False):
        if before is None:
            text = f"from {move.source or 'another base'}"
        elif not before.is_continued_by(move):
            text += f", then from {move.source or 'another base'}"
        text += f" to {move.target}"
    return text


@dataclass(frozen=True)
class StatedBase:
    """The base that a LoRA is for by its header; "" where that is silent."""

    name: str = ""
    model: str = ""  # of which it is, such as "Wan 2.2"
    moved: bool = False  # whether prolora moved the LoRA to it

    @classmethod
    def read(cls, metadata: Mapping[str, str], model: str | None = None) -> StatedBase:
        """Reads a header; `model` is what it calls the model."""
        moves = read_moves(metadata)
        name = moves[-1].target if moves else metadata.get("ss_sd_model_name", "")
        return cls(re.split(r"[/\\]", name)[-1], model or "", bool(moves))


UNSTATED = StatedBase()
"""What a silent header says."""


def explain_other_bases(stated: Mapping[str, StatedBase]) -> str:
    """Lists which LoRAs (name -> base) are for different bases; "" if none is."""
    bases = {lora: one.name for lora, one in stated.items() if one.name}
    models = {lora: one.model for lora, one in stated.items() if one.model}
    for names in (bases, models):
        firsts = {fold_base_name(names[lora]): lora for lora in reversed(names)}
        if len(firsts) < 2:
            continue
        listed = ", ".join(f"{lora} on {names[lora]}" for lora in [*firsts.values()][:-5:-1])
        return (
            f"By their headers these LoRAs were trained on different bases: {listed}. Where "
            "these differ much, move the others to the first: `transfer()`."
        )
    moved = next((lora for lora, one in stated.items() if one.moved), None)
    silent = next((lora for lora in stated if lora not in bases), None)
    if moved is None or silent is None:
        return ""
    return f"{moved} was moved to {bases[moved]}, and {silent} names no base: is it for that, too?"


def fold_base_name(name: str) -> str:
    """Folds a base's name: no folders, case or words for its storage."""
    plain = _QUANTISED.sub("", re.split(r"[/\\]", name)[-1].lower())
    words = re.split(r"[\s._-]+", plain)
    return " ".join(word for word in words if word and not _FORMS.fullmatch(word))
