"""What the header of a LoRA file says of the moves that made it: from which base to which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

PREFIX = "prolora."
EARLIER = "earlier_moves"
"""The entry, after `PREFIX`, that lists all moves but the last; absent after a first move."""
MOST_EARLIER = 64
"""How many earlier moves are kept, the latest: more were never made, and a header is anybody's."""
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Move:
    """One move of a LoRA from a base to another; a field is "" where the header does not tell.

    Attributes:
        source: the name of the base that it was moved from.
        target: the name of the base that it was moved to.
        source_hash: which files the source was, as `bases.identity.compute_identity` gives it.
        target_hash: which files the target was.
        method: how it was moved.
        version: of the prolora that moved it.
    """

    source: str = ""
    target: str = ""
    source_hash: str = ""
    target_hash: str = ""
    method: str = ""
    version: str = ""

    def is_continued_by(self, other: Move) -> bool:
        """Whether another move starts at the base that this one ended at."""
        if self.target_hash and other.source_hash:
            return self.target_hash == other.source_hash
        return self.target == other.source


_FIELDS = tuple(field.name for field in fields(Move))


def read_moves(metadata: Mapping[str, str]) -> tuple[Move, ...]:
    """The moves that made a file, oldest first; empty where prolora did not move it.

    Args:
        metadata: of the file's header. Anybody may have written it: what is not understood is
            taken as absent, and so is a list of moves of more than a megabyte.
    """
    last = Move(**{name: metadata.get(PREFIX + name, "") for name in _FIELDS})
    if not last.target:
        return ()
    try:
        told = metadata.get(PREFIX + EARLIER, "[]")
        listed = json.loads(told) if len(told) <= _LONGEST else []
    except (ValueError, RecursionError):
        listed = []
    earlier = [
        Move(**{name: text for name in _FIELDS if isinstance(text := entry.get(name), str)})
        for entry in (listed[-MOST_EARLIER:] if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    ]
    return (*earlier, last)


def read_provenance(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a header says of how prolora made the file, without the prefix of its keys."""
    return {
        key.removeprefix(PREFIX): text for key, text in metadata.items() if key.startswith(PREFIX)
    }


def write_moves(moves: Sequence[Move]) -> dict[str, str]:
    """The entry, without its prefix, that keeps moves in the header of the next result."""
    if not moves:
        return {}
    listed = [{key: text for key, text in asdict(move).items() if text} for move in moves]
    return {EARLIER: json.dumps(listed, ensure_ascii=False)}


def describe_moves(moves: Sequence[Move]) -> str:
    """The way of a LoRA in words: "from A to B to C", with "then from X" where it was broken."""
    text = ""
    for before, move in zip((None, *moves), moves, strict=False):
        if before is None:
            text = f"from {move.source or 'another base'}"
        elif not before.is_continued_by(move):
            text += f", then from {move.source or 'another base'}"
        text += f" to {move.target}"
    return text
