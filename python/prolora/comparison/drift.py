"""How far two base models stand apart where a LoRA acts: from weights alone, without any SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch

from ..architectures.modules import matrix_shape
from ..bases import Base, check_finite
from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.memory import Budget
from ..core.affinity import Affinity
from ..core.parallel import map_on_threads
from ..errors import NonFiniteWeights

_KEY = "affinity 4 {} {}"  # of four numbers


def measure_affinities(
    source: Base,
    target: Base,
    pairs: Sequence[tuple[str, str]],
    progress: Progress | None = None,
    cache: BasisCache | None = None,
    room: Budget | None = None,
    device: torch.device | str = "cpu",
) -> list[Affinity]:
    """Measures the affinity of every pair; reads each weight once, a few at a time.

    A pair that the cache knows is not read at all: it was finite when it was looked at.

    `pairs` are (source module, target module) of equal matrix shape. The cache remembers affinities
    by the content of weights; `room` bounds how many pairs are in memory at a time.

    Raises:
        NonFiniteWeights: names the first tensor that holds NaN or Inf, and its file.
    """
    cache = cache or BasisCache(None)
    notes = cache.pairs(source, target)
    bases = source, target
    places = [[cache.place(b, m) for b, m in zip(bases, pair, strict=True)] for pair in pairs]
    remembered = [None if None in at else notes.get(_KEY.format(*at)) for at in places]
    affinities = [Affinity(**x) if isinstance(x, dict) else None for x in remembered]
    missing = [i for i, affinity in enumerate(affinities) if affinity is None]
    total, start, room = len(missing), 0, room or Budget()
    while start < total:
        shape = matrix_shape(target.shapes[pairs[missing[start]][1]])
        part = missing[start : start + room.pairs(shape)]
        measure = partial(_measure_pair, source, target, device)
        each = [pairs[i] for i in part]
        # On a GPU one after the other, in the caller's stream.
        on_cpu = torch.device(device).type == "cpu"
        seen = map_on_threads(measure, each) if on_cpu else list(map(measure, each))
        for i, affinity in zip(part, seen, strict=True):
            affinities[i] = affinity
            at = [cache.place(b, m, learn=True) for b, m in zip(bases, pairs[i], strict=True)]
            if None not in at:  # both are known by their content, now that they were read
                notes.put(_KEY.format(*at), asdict(affinity))
        start += len(part)
        if progress:
            progress(start, total, pairs[part[-1]][1])
    return [affinity for affinity in affinities if affinity is not None]


def _measure_pair(
    source: Base, target: Base, device: torch.device | str, pair: tuple[str, str]
) -> Affinity:
    """Returns the affinity of a pair, computed on a device; refuses NaN and Inf by name."""
    shape = matrix_shape(target.shapes[pair[1]])
    # A base in memory may be on a card, and the other one in a file.
    first, second = source.read(pair[0]).to(device), target.read(pair[1]).to(device)
    first, second = first.reshape(shape), second.reshape(shape)
    try:
        return Affinity.of(first, second)
    except NonFiniteWeights:
        check_finite(source, [pair[0]])  # says which tensor, and where in it
        check_finite(target, [pair[1]])
        raise
