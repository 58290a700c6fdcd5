"""The family whose names a checkpoint's keys are, and their modules.

Authors stack the projections that read the same features (q, k, v, and sometimes the feed-forward
too) into one matrix; diffusers keeps them separate. Every module here is a view of its rows, so a
base gives the same weights, bit by bit, in either spelling.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ...architectures.families import known_families
from ...architectures.family import AuthorsWeight, Family
from ...architectures.identify import find_parts, identify_names, select_kinds
from ...architectures.modules import find_block, matrix_shape
from ...errors import ShapeMismatch
from ..weights import ConvertedWeight, RowsWeight, Weight

_LANGUAGE_MODEL = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.\w+")


@dataclass(frozen=True)
class FamilyNames:
    """The names of one family, in one of its two spellings."""

    family: Family
    by_authors: bool  # the authors' (or ComfyUI's) names and not diffusers'

    def split_weight(self, path: str, weight: Weight, where: str) -> dict[str, Weight] | None:
        """Returns diffusers' modules in a module of the authors, None if unknown.

        `path` is the authors' name, without prefix and `.weight`; `weight` is [m, n].

        Raises:
            ShapeMismatch: a fused matrix that cannot be cut as its name says.
        """
        stored = self.family.find_weight(path)
        if stored is None:
            return None
        if len(stored.parts) > 1:
            rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
            published = map(matrix_shape, self.family.find_shapes(stored.parts[0]))
            first = rows * stored.shares[0] // sum(stored.shares)
            views = cut_rows(stored, weight) if rows else {}
            if not views or not any(first * n == columns * m for m, n in published):
                raise ShapeMismatch(
                    f"{where}: {path} is {list(weight.shape)}, which does not hold "
                    f"{len(stored.parts)} layers of {columns} inputs one below the other as in "
                    f"{self.family.title}; the checkpoint is of another architecture"
                )
            return views
        swapped = stored.is_swapped(weight.shape)
        if swapped and (not weight.shape or weight.shape[0] % 2):
            raise ShapeMismatch(
                f"{where}: {path} is {list(weight.shape)}, which is not a shift above a scale as "
                f"in {self.family.title}; the checkpoint is damaged or of another architecture"
            )
        return {stored.parts[0]: ConvertedWeight(weight) if swapped else weight}

    def split_vector(self, path: str, vector: Weight) -> dict[str, Weight]:
        """Returns diffusers' modules -> their rows of an authors' vector; {} if unknown."""
        stored = self.family.find_weight(path)
        if stored is None or stored.swap == "if two":
            return {}
        if stored.swap == "always":
            return {} if vector.shape[0] % 2 else {stored.parts[0]: ConvertedWeight(vector)}
        return cut_rows(stored, vector)

    def has_block(self, path: str) -> bool:
        """Returns whether a module lies in a stack that the family knows completely."""
        block = find_block(path)
        if block is not None and self.family.unet:  # some models have further layers beside blocks
            return block.stack.endswith(".transformer_blocks")
        return block is not None and block.stack in self._stacks

    @cached_property
    def _stacks(self) -> set[str]:
        """The stacks of blocks that hold what diffusers' stacks hold."""
        names = (*self.family.authors, *self.family.shapes)
        blocks = (find_block(name.replace(".N.", ".0.")) for name in names)
        return {block.stack for block in blocks if block is not None}


def cut_rows(stored: AuthorsWeight, weight: Weight) -> dict[str, Weight]:
    """Splits a fused weight into its modules, each with its rows; {} if they do not divide."""
    if len(stored.parts) == 1:
        return {stored.parts[0]: weight}
    edges = itertools.accumulate(stored.split_rows(weight.shape[0]), initial=0)
    return {
        name: RowsWeight(weight, start, stop)
        for name, (start, stop) in zip(stored.parts, pairwise(edges), strict=False)
    }


def find_family_names(shapes: Mapping[str, tuple[int, ...]]) -> FamilyNames | None:
    """Returns whose names some modules (without prefix) have, None if unknown.

    Where several families fit, all read the modules alike, or the first is as good as any other.
    """
    kinds = select_kinds(shapes)
    family = next((known_families()[id_] for id_ in identify_names(kinds)), None)
    if family is None:
        return None
    names = [kind.name for kind in kinds if find_parts(family, kind)]
    by_authors = any(family.find_module(name) is None for name in names)
    if by_authors and any(find_block(n) and family.find_weight(n) is None for n in names):
        return None  # blocks with names of both kinds are those of another family
    if all(_LANGUAGE_MODEL.fullmatch(name) for name in names):
        return None  # names that ACE-Step's authors share with many others
    return FamilyNames(family, by_authors)
