"""Blocks that bear another block's number: recognised by their weights, without any SVD.

A student that lost blocks often numbers those that are left from zero, so that equal names pair
blocks that have nothing in common. Fine-tuning turns a weight by little, so the cosine of two
weights alone tells which block a block was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..architectures.modules import (
    find_block,
    have_equal_shapes,
    is_attention,
    is_in_text_encoder,
    matrix_shape,
)
from ..bases import Base
from ..core.verdict import MIN_COSINE, STRANGE_COSINE
from .module_map import AUTO_MATCH, Match, Renumbering, find_partners

SAMPLED_ROWS = 64
"""Rows of a weight behind its cosine: at 64 × 640 entries chance stays below 0.02."""


class _NumberedBlock(NamedTuple):
    stack: str
    number: str

    def module(self, local: str) -> str:
        return f"{self.stack}.{self.number}.{local}"


def recognise_blocks(
    match: Match, source: Base, target: Base, cosines: Mapping[str, float]
) -> Match:
    """Replaces a namesake by the block with the target block's weights.

    A block whose weight has nothing in common with its namesake's gets the source's block whose
    weight points the same way, if there is one. All else stays as it was; so does every match but
    "auto".

    `cosines` are of the target's modules with their namesakes, as far as they were measured: no
    weight is read unless a block is a stranger. Returns `match` itself, or a `Renumbering`.

    Raises:
        UnsupportedFormat: the bases cannot be paired by name.
    """
    if not isinstance(match, str) or match != AUTO_MATCH:
        return match
    table, rule = find_partners(source, target, match)
    measured = {t: s for t, s in table.items() if t in cosines}
    witnesses = _choose_witnesses(measured, source, target)
    strangers = [
        block for block, local in witnesses.items() if cosines[block.module(local)] < STRANGE_COSINE
    ]
    origins = _find_origins(strangers, witnesses, source, target)
    if not origins:
        return match
    corrected = {}
    for module, origin in table.items():
        place = _find_block(module)
        if place is not None and place in origins:
            origin = origins[place].module(module.removeprefix(place.module("")))
        if origin in source.shapes:
            corrected[module] = origin
    blocks = {f"{t.stack}.{t.number}": f"{s.stack}.{s.number}" for t, s in origins.items()}
    return Renumbering(corrected, rule, blocks)


def _find_block(module: str) -> _NumberedBlock | None:
    block = None if is_in_text_encoder(module) else find_block(module)
    return _NumberedBlock(block.stack, block.number) if block else None


def _choose_witnesses(
    table: Mapping[str, str], source: Base, target: Base
) -> dict[_NumberedBlock, str]:
    """Returns target block -> its smallest weight with a namesake, of attention if any."""
    witnesses: dict[_NumberedBlock, tuple[bool, int, str]] = {}
    for module, origin in table.items():
        block, partner = _find_block(module), _find_block(origin)
        shape = target.shapes[module]
        equal = have_equal_shapes(source.shapes[origin], shape)
        if block is None or partner is None or not equal or len(shape) < 2:
            continue
        local = module.removeprefix(block.module(""))
        if partner.module(local) == origin:
            ranked = not is_attention(module), math.prod(shape), local
            witnesses[block] = min(witnesses.get(block, ranked), ranked)
    return {block: local for block, (_, _, local) in witnesses.items()}


def _sample_weight(base: Base, module: str) -> Tensor:
    """Returns rows of a weight as a vector of length 1; NaN if zero or not finite."""
    weight = base.read(module)
    weight = weight.reshape(matrix_shape(base.shapes[module]))
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)].to(torch.float32).flatten()
    sample: Tensor = rows / torch.linalg.vector_norm(rows)
    return sample


def _find_origins(
    strangers: Sequence[_NumberedBlock],
    witnesses: Mapping[_NumberedBlock, str],
    source: Base,
    target: Base,
) -> dict[_NumberedBlock, _NumberedBlock]:
    """Finds source blocks whose witnesses point the same way as the strangers'."""
    # Only blocks whose witnesses have one name in the block and one shape are compared.
    kinds: dict[tuple[str, tuple[int, int]], list[_NumberedBlock]] = {}
    for block in strangers:
        local = witnesses[block]
        shape = matrix_shape(target.shapes[block.module(local)])
        kinds.setdefault((local, shape), []).append(block)
    origins = {}
    for (local, size), blocks in kinds.items():
        candidates = [
            place
            for module, shape in source.shapes.items()
            if (place := _find_block(module)) is not None
            and module == place.module(local)
            and matrix_shape(shape) == size
        ]
        sources = torch.stack([_sample_weight(source, b.module(local)) for b in candidates])
        targets = torch.stack([_sample_weight(target, b.module(local)) for b in blocks])
        cosines = targets @ sources.mT
        best, places = cosines.nan_to_num(0.0).max(-1)
        for block, cosine, place in zip(blocks, best.tolist(), places.tolist(), strict=True):
            if cosine >= MIN_COSINE:
                origins[block] = candidates[place]
    return origins
