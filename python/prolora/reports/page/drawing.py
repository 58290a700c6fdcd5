"""The layout of a map of places: columns, cells and a legend, for the template to draw.

What is kept is drawn in one colour whose opacity grows with the share, which reads alike on light
and dark ground and for every kind of colour vision; what did not move is hatched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.means import weighted_mean
from ..place_map import MapColumn, PlaceMap, Spot

# Pixels.
WIDEST, ROW, LABEL_SIZE, HEAD = 940, 17, 11, 34
LEAST_PITCH, GREATEST_PITCH = 9, 24
PLACE_GAP, STAGE_GAP = 3, 9
LONGEST_HEADING = 24  # characters
CHARACTER = 0.56  # width of a mean character, of the size of its font
FAINTEST = 0.07  # opacity of a share of 0, which moved all the same
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)

_SHORT = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Box:
    """A cell of the map, or a sample of the legend."""

    kind: str  # "kept", "fitted" or "lost"
    opacity: float | None  # of what is kept
    text: str  # shown under the pointer, or beside the sample
    row: int = 0  # of the table, to which the cell leads
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class DrawnMap:
    """A map, measured."""

    width: float
    height: int
    pitch: float  # from one column of a stack to the next
    labels: int  # width of the names of the rows
    kinds: list[tuple[str, int]]  # (kind of module, its baseline)
    stages: list[tuple[str, float]]  # (heading, left edge)
    depths: list[tuple[str, float]]  # (number of a block, its middle)
    cells: list[Box]
    legend: list[Box]
    title: str


def draw_map(places: PlaceMap) -> DrawnMap:
    """Lays out columns as wide as the page, with gaps between stacks and stages."""
    columns, kinds = places.columns, places.kinds
    gaps = [0.0]
    for before, column in itertools.pairwise(columns):
        wide = STAGE_GAP if before.stage != column.stage else PLACE_GAP
        gaps.append(wide if before.place != column.place else 0.0)
    room = (WIDEST - sum(gaps)) / max(1, len(columns))
    pitch = round(min(GREATEST_PITCH, max(LEAST_PITCH, room)), 1)
    lefts: dict[MapColumn, float] = {}
    stages: list[tuple[str, float]] = []
    at, free, stage = 0.0, 0.0, None  # where the last heading ends
    for gap, column in zip(gaps, columns, strict=True):
        at += gap
        if column.stage != stage:
            stage, at = column.stage, max(at, free)
            heading = _shorten(stage)
            stages.append((heading, round(at, 1)))
            free = at + len(heading) * LABEL_SIZE * CHARACTER + STAGE_GAP
        lefts[column] = round(at, 1)
        at += pitch
    tops = {kind: HEAD + ROW * i for i, kind in enumerate(kinds)}
    cells = [
        _draw_cell(places.spots, cell, lefts[column], tops[kind])
        for (column, kind), cell in places.cells.items()
    ]
    every_fifth = [c for c in columns if c.depth.isdecimal() and len(c.depth) < 3]
    samples = [Box("kept", _opacity(share), f"{share:.0%}") for share in STEPS]
    samples += [Box("fitted", None, places.there), Box("lost", None, places.missing)]
    return DrawnMap(
        width=round(max(at, free), 1),
        height=HEAD + ROW * len(kinds),
        pitch=pitch,
        labels=round(max(map(len, kinds)) * LABEL_SIZE * CHARACTER + 10),
        kinds=[(kind, top + 12) for kind, top in tops.items()],
        stages=stages,
        depths=[
            (column.depth, round(lefts[column] + pitch / 2 - 0.5, 1))
            for column in every_fifth
            if int(column.depth) % 5 == 0
        ],
        cells=cells,
        legend=[sample for sample in samples if sample.kind in {cell.kind for cell in cells}],
        title=places.title,
    )


def _draw_cell(spots: Sequence[Spot], indices: Sequence[int], x: float, y: float) -> Box:
    """Draws the mean of the modules' numbers by weight; none where one is not known."""
    here = [spots[i] for i in indices]
    share = None
    if all(spot.share is not None for spot in here):
        share = weighted_mean((spot.weight, spot.share) for spot in here)
        share = weighted_mean((1.0, spot.share) for spot in here) if share is None else share
    is_there = any(spot.is_there for spot in here)
    kind = "lost" if not is_there else "fitted" if share is None else "kept"
    opacity = _opacity(share) if kind == "kept" and share is not None else None
    return Box(kind, opacity, "\n".join(spot.text for spot in here), indices[0], x, y)


def _opacity(share: float) -> float:
    """Maps a share to an opacity; shares above 1 are clipped."""
    return round(FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share)), 2)


def _shorten(stage: str) -> str:
    """Shortens `down_blocks.1` to "down 1", and cuts long names."""
    root, _, number = stage.partition(".")
    if root in _SHORT:
        return f"{_SHORT[root]} {number}".rstrip()
    name = stage.removesuffix("transformer_blocks").strip("._") or "transformer"
    return name if len(name) <= LONGEST_HEADING else f"{name[: LONGEST_HEADING - 1]}…"
