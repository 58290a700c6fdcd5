"""Transformers in their authors' spelling (FLUX, SD3, PixArt): fused layers as rows of one matrix.

The authors stack the projections that read the same features (q, k, v, and in FLUX's single blocks
the feed-forward too) into one matrix; diffusers keeps them separate. Every module here is a view of
its rows, so a base gives the same weights, bit by bit, in either spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ...architectures.authors import REST, AuthorsNames
from ...architectures.flux import FLUX
from ...architectures.sd3_pixart import PIXART, SD3
from ...errors import ShapeMismatch
from ..weights import ConvertedWeight, RowsWeight, Weight

_AUTHORS = (FLUX, SD3, PIXART)


def find_authors(keys: Iterable[str]) -> AuthorsNames | None:
    """The authors' names that keys without prefix are spelled in, if they are in such names."""
    for key in keys:
        for authors in _AUTHORS:
            if authors.sign.match(key):
                return authors
    return None


def split_weight(
    authors: AuthorsNames, path: str, weight: Weight, where: str
) -> dict[str, Weight] | None:
    """Diffusers' modules that the authors' module holds, None if it is not known.

    Args:
        authors: whose names.
        path: the authors' name, without prefix and `.weight`.
        weight: [m, n] of the fused module.
        where: what messages call the checkpoint.

    Raises:
        ShapeMismatch: a fused matrix that cannot be cut as its name says.
    """
    parts = authors.find_parts(path)
    if parts is None:
        return None
    if len(parts) > 1:
        return _split_rows(parts, path, weight, where)
    swapped = _is_shift_and_scale(parts[0], weight.shape)
    return {parts[0]: ConvertedWeight(weight) if swapped else weight}


def _split_rows(names: tuple[str, ...], path: str, weight: Weight, where: str) -> dict[str, Weight]:
    """The modules of a fused matrix [m, n]: n rows each, the last the rest where marked "…"."""
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    open_end = names[-1].endswith(REST)
    edges = [columns * i for i in range(len(names) + 1)]
    if open_end:
        edges[-1] = rows
    if edges[-1] != rows or edges[-1] <= edges[-2]:
        raise ShapeMismatch(
            f"{where}: {path} is {list(weight.shape)}, which does not hold {len(names)} layers of "
            f"{columns} inputs one below the other; the checkpoint is of another architecture"
        )
    return {
        name.removesuffix(REST): RowsWeight(weight, start, stop)
        for name, (start, stop) in zip(names, pairwise(edges), strict=True)
    }


def _is_shift_and_scale(module: str, shape: tuple[int, ...]) -> bool:
    """Whether the authors keep (shift, scale) where diffusers keeps (scale, shift).

    So it is wherever a layer makes just these two: after the last block, and in SD3 for the text
    stream of the last block, whose output is not used.
    """
    if module.endswith((".norm1_context.linear", "norm_out.linear")):
        return len(shape) == 2 and shape[0] == 2 * shape[1]
    return False
