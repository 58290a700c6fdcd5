"""The map of places as SVG: a picture for a page, a small one for a notebook, a thumbnail.

What is kept is drawn in one colour whose opacity grows with the share, which reads alike on light
and dark ground and for every kind of colour vision; what did not move is hatched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ..place_map import MapCell, MapColumn, PlaceMap
from .markup import Html, join, tag

# Pixels.
WIDEST, ROW, LABEL_SIZE, HEAD = 940, 17, 11, 34
LEAST_PITCH, GREATEST_PITCH = 9, 24
PLACE_GAP, STAGE_GAP = 3, 9
LONGEST_HEADING = 24  # characters
CHARACTER = 0.56  # width of a mean character, of the size of its font
FAINTEST = 0.07  # opacity of a share of 0, which moved all the same
NOTEBOOK_COLOUR = "#3b7dd8"
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)

_SHORT = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class _DrawingLayout:
    """The positions of the columns."""

    lefts: dict[MapColumn, float]  # the left edge of each column
    pitch: float  # from one column of a stack to the next
    width: float  # of everything
    stages: list[tuple[str, float]]  # (heading of a stage, left edge)

    @classmethod
    def of(
        cls,
        columns: list[MapColumn],
        widest: float = WIDEST,
        least: float = LEAST_PITCH,
        headed: bool = False,
    ) -> _DrawingLayout:
        """Lays out columns as wide as `widest` allows, with gaps between stacks and stages.

        Each column is at least `least` wide; with `headed`, stages have room for their headings,
        whatever that takes.
        """
        gaps = [0.0]
        for before, column in itertools.pairwise(columns):
            wide = STAGE_GAP if before.stage != column.stage else PLACE_GAP
            gaps.append(wide if before.place != column.place else 0.0)
        room = (widest - sum(gaps)) / max(1, len(columns))
        pitch = round(min(GREATEST_PITCH, max(least, room)), 1)
        lefts: dict[MapColumn, float] = {}
        stages: list[tuple[str, float]] = []
        at, free, stage = 0.0, 0.0, None  # where the last heading ends
        for gap, column in zip(gaps, columns, strict=True):
            at += gap
            if column.stage != stage:
                stage, at = column.stage, max(at, free)
                heading = _shorten(stage)
                stages.append((heading, round(at, 1)))
                free = at + len(heading) * LABEL_SIZE * CHARACTER + STAGE_GAP if headed else 0.0
            lefts[column] = round(at, 1)
            at += pitch
        return cls(lefts, pitch, round(max(at, free), 1), stages)


def draw_map(places: PlaceMap) -> Html:
    """Draws the labels beside the map, so that the map may scroll."""
    layout, kinds = _DrawingLayout.of(places.columns, headed=True), places.kinds
    height = HEAD + ROW * len(kinds)
    labels = max(len(kind) for kind in kinds) * LABEL_SIZE * CHARACTER + 10
    names = [
        tag("text", kind, x=round(labels - 6), y=HEAD + ROW * i + 12, text_anchor="end")
        for i, kind in enumerate(kinds)
    ]
    sides = tag(
        "svg", *names, class_="kinds", width=round(labels), height=height, aria_hidden="true"
    )
    cells = _draw_cells(places, layout)
    summary = f"Heat map: {len(places.spots)} modules by block and kind"
    picture = tag(
        "svg",
        _HATCH,
        *_draw_head(places, layout),
        *cells,
        class_="map",
        width=layout.width,
        height=height,
        role="group",
        aria_label=summary,
    )
    return join(
        [
            sides,
            tag(
                "div",
                picture,
                class_="scroll",
                tabindex=0,
                role="region",
                aria_label="Map of places",
            ),
        ]
    )


def _draw_cells(places: PlaceMap, layout: _DrawingLayout) -> Iterator[Html]:
    """Draws each cell as a link to its row; the arrow keys move between them."""
    numbers = {kind: i for i, kind in enumerate(places.kinds)}
    first = True
    for column in places.columns:
        for kind in places.kinds:
            cell = places.cells.get((column, kind))
            if cell is None:
                continue
            rect = _draw_rect(
                cell, layout.lefts[column], HEAD + ROW * numbers[kind], layout.pitch - 1, ROW - 2
            )
            title = tag("title", "\n".join(spot.text for spot in cell.spots))
            yield tag("a", title, rect, href=f"#m{cell.indices[0]}", tabindex=0 if first else -1)
            first = False


def _draw_rect(cell: MapCell, x: float, y: float, width: float, height: float) -> Html:
    shape = {"x": x, "y": y, "width": round(width, 1), "height": height}
    if not cell.is_there:
        return tag("rect", class_="lost", **shape)
    if cell.share is None:
        return tag("rect", class_="fitted", **shape)
    return tag("rect", class_="kept", fill_opacity=_opacity(cell.share), **shape)


def _opacity(share: float) -> float:
    """Maps a share to an opacity; shares above 1 are clipped."""
    return round(FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share)), 2)


def _draw_head(places: PlaceMap, layout: _DrawingLayout) -> Iterator[Html]:
    """Draws the stages above the map, and the numbers of their blocks."""
    for heading, left in layout.stages:
        yield tag("text", heading, x=left, y=11, class_="stage")
    for column in places.columns:
        if column.depth.isdecimal() and len(column.depth) < 3 and int(column.depth) % 5 == 0:
            middle = round(layout.lefts[column] + layout.pitch / 2 - 0.5, 1)
            yield tag("text", column.depth, x=middle, y=28, class_="depth", text_anchor="middle")


def _shorten(stage: str) -> str:
    """Shortens `down_blocks.1` to "down 1", and cuts long names.

    `single_transformer_blocks` becomes "single".
    """
    root, _, number = stage.partition(".")
    if root in _SHORT:
        return f"{_SHORT[root]} {number}".rstrip()
    name = stage.removesuffix("transformer_blocks").strip("._") or "transformer"
    return name if len(name) <= LONGEST_HEADING else f"{name[: LONGEST_HEADING - 1]}…"


_HATCH = tag(
    "defs",
    tag(
        "pattern",
        tag("path", d="M-1 1l2-2M0 5l5-5M4 6l2-2", class_="hatch"),
        id="hatch",
        width=5,
        height=5,
        patternUnits="userSpaceOnUse",
    ),
)


def draw_legend(places: PlaceMap) -> Html:
    """Draws the meaning of the map's colours."""
    cells = places.cells.values()
    samples: list[tuple[str, str, float | None]] = []
    if any(cell.is_there and cell.share is not None for cell in cells):
        samples = [(f"{share:.0%}", "kept", _opacity(share)) for share in STEPS]
    if any(cell.is_there and cell.share is None for cell in cells):
        samples.append((places.there, "fitted", None))
    if any(not cell.is_there for cell in cells):
        samples.append((places.missing, "lost", None))
    swatches = [
        tag("span", _swatch(tag("rect", class_=kind, fill_opacity=x, width=22, height=12)), name)
        for name, kind, x in samples
    ]
    return tag("p", f"{places.title}:" if places.title else "", *swatches, class_="legend")


def _swatch(box: Html) -> Html:
    return tag("svg", box, width=22, height=12, aria_hidden="true")


def draw_thumbnail(places: PlaceMap, label: str, width: float = 220, row: float = 4) -> Html:
    """Draws the map without words, with one path for equal cells."""
    layout = _DrawingLayout.of(places.columns, width, least=1)
    numbers = {kind: i for i, kind in enumerate(places.kinds)}
    paths: dict[float, list[str]] = {}
    wide, high = round(max(0.8, layout.pitch - 0.4), 1), round(row - 0.5, 1)
    for (column, kind), cell in places.cells.items():
        share = cell.share if cell.is_there else -1.0
        opacity = 0.0 if share == -1.0 else round(_opacity(1.0 if share is None else share), 1)
        left = layout.lefts[column]
        paths.setdefault(opacity, []).append(
            f"M{left:g} {numbers[kind] * row:g}h{wide:g}v{high:g}h-{wide:g}z"
        )
    shapes = [
        tag("path", d="".join(path), fill_opacity=opacity)
        if opacity
        else tag("path", d="".join(path), fill="currentColor", fill_opacity=0.14)
        for opacity, path in sorted(paths.items())
    ]
    return tag(
        "svg",
        *shapes,
        class_="thumb",
        width=layout.width,
        height=round(row * len(places.kinds)),
        viewBox=f"0 0 {layout.width:g} {row * len(places.kinds):g}",
        fill=NOTEBOOK_COLOUR,
        role="img",
        aria_label=label,
    )


def draw_bar(share: float | None) -> Html:
    """Draws a bar as long as a share, for a cell of a table."""
    if share is None or share != share:
        return Html("")
    full = round(60 * min(1.0, max(0.0, share)), 1)
    return tag(
        "svg",
        tag("rect", class_="rail", width=60, height=8),
        tag("rect", class_="kept", width=full, height=8),
        width=60,
        height=8,
        class_="bar",
        aria_hidden="true",
    )
