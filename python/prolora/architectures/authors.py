"""How the authors of a transformer call its modules, where diffusers calls them otherwise.

The authors stack the projections that read the same features (q, k, v, and in FLUX's single blocks
the feed-forward too) into one matrix; diffusers keeps them separate. A table says which modules of
diffusers the rows of every module of the authors are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

REST = "…"
"""Behind the last part of a fused matrix: it has all rows that the parts before it leave."""

_NUMBER = re.compile(r"\.(\d{1,3})\.")


@dataclass(frozen=True)
class AuthorsNames:
    """The names of one family of transformers.

    Attributes:
        title: for people.
        blocks: what names of modules in the blocks start with; those are known completely.
        sign: matches the beginning of keys that only this family has.
        modules: authors' module -> diffusers' module, N any number. Several modules are rows of a
            fused matrix, in this order; each has as many rows as the matrix has columns, but for a
            last one marked `REST`.
    """

    title: str
    blocks: tuple[str, ...]
    sign: re.Pattern[str]
    modules: Mapping[str, str | tuple[str, ...]]

    def find_parts(self, path: str) -> tuple[str, ...] | None:
        """Diffusers' modules that the authors' module holds, None if it is not known.

        Args:
            path: the authors' name, without prefix and `.weight`.
        """
        number = _NUMBER.search(path)
        parts = self.modules.get(_NUMBER.sub(".N.", path, count=1), self.modules.get(path))
        if parts is None:
            return None
        fill = f".{number[1]}." if number else ".N."
        parts = (parts,) if isinstance(parts, str) else parts
        return tuple(part.replace(".N.", fill) for part in parts)

    def is_in_block(self, path: str) -> bool:
        """Whether a module of the authors' lies in one of the transformer's blocks."""
        return path.startswith(self.blocks)
