"""A picture of a comparison: overlap above chance by place and depth, and by place and module.

Needs matplotlib (the `plot` extra), which is imported only to draw.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from os import PathLike
from typing import Any

from ..comparison.comparison import Comparison
from ..comparison.module_comparison import ModuleComparison, average_field
from ..comparison.transformer_blocks import AROUND, column_order, split_module, stack_order
from ..errors import OutputError
from ..files.ownership import sign_png
from ..files.writing import write_bytes_atomically
from ..version import __version__

# Inches, and points of the fonts.
CELL, GAP, BAR = (0.44, 0.27), 0.35, (2.6, 0.13)
TEXT, LABEL, NUMBER = 11, 8.5, 7.5
DPI = 150
# From pale to dark blue, in equal steps of overlap; no red and green, which some cannot tell apart.
RAMP = ("#f6f1e7", "#cbd9e8", "#8ab2d7", "#427eb8", "#08306b")
EMPTY = "#cbd9e8"

Cells = dict[tuple[str, str], float]


def overlap_by_depth(comparison: Comparison) -> Cells:
    """(place, number of the block or `AROUND`) -> mean overlap above chance of its modules."""
    return _average_cells(comparison, lambda place, depth, leaf: (place, depth))


def overlap_by_module(comparison: Comparison) -> Cells:
    """(place, module inside a block) -> mean overlap above chance over the place's blocks."""
    return _average_cells(comparison, lambda place, depth, leaf: (place, leaf))


def _average_cells(
    comparison: Comparison, key: Callable[[str, str, str], tuple[str, str]]
) -> Cells:
    groups: dict[tuple[str, str], list[ModuleComparison]] = {}
    for module in comparison.modules:
        groups.setdefault(key(*split_module(module.target)), []).append(module)
    return {found: average_field(modules, "above") for found, modules in groups.items()}


def save_heatmap(comparison: Comparison, path: str | PathLike[str]) -> None:
    """Draws the two heat maps into a PNG file.

    Raises:
        OutputError: matplotlib is missing, the comparison holds no overlaps, or the file cannot be
            written.
    """
    figure, picture = draw_heatmap(comparison), io.BytesIO()
    software = {"Software": f"prolora {__version__}"}
    figure.savefig(picture, format="png", bbox_inches="tight", pad_inches=0.25, metadata=software)
    write_bytes_atomically(path, sign_png(picture.getvalue()))


def check_matplotlib() -> None:
    """Raises OutputError, with the way out, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OutputError('drawing needs matplotlib: pip install "prolora[plot]"') from error


def draw_heatmap(comparison: Comparison) -> Any:
    """The picture, as a matplotlib figure.

    Raises:
        OutputError: matplotlib is missing, or the comparison holds no overlaps.
    """
    tables = [overlap_by_depth(comparison), overlap_by_module(comparison)]
    if all(math.isnan(value) for value in tables[0].values()):
        raise OutputError("there is no overlap to draw: compare without --quick")
    check_matplotlib()
    from matplotlib.figure import Figure

    captions = [
        f"by depth: number of the transformer block; {AROUND} = layers around the blocks",
        "by kind of module inside the blocks, and around them",
    ]
    grids = [_Grid(cells, caption) for cells, caption in zip(tables, captions, strict=True)]
    left = max(_measure_text(place, LABEL) for grid in grids for place in grid.rows) + 0.1
    width = max(6.5, left + max(len(grid.columns) for grid in grids) * CELL[0])
    sentences = (
        f"Overlap of the leading subspaces above chance: {comparison.source} (source), "
        f"{comparison.target} (target)",
        comparison.verdict.sentence(),
    )
    lines = [line for text in sentences for line in textwrap.wrap(text, int(width / 0.083))]
    top = len(lines) * 0.2 + GAP
    height = top + sum(grid.height + GAP for grid in grids) + 0.7
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    figure.text(0, 1, "\n".join(lines), size=TEXT, va="top", linespacing=1.3)
    for grid in grids:
        grid.draw(figure, left, top)
        top += grid.height + GAP
    _draw_legend(figure, left, top, any(map(math.isnan, tables[1].values())))
    return figure


class _Grid:
    """One heat map: a row for each place, a column for each depth or kind of module."""

    def __init__(self, cells: Cells, caption: str) -> None:
        self.cells, self.caption = cells, caption
        self.rows = sorted(dict.fromkeys(place for place, _ in cells), key=stack_order)
        self.columns = _sort_columns(cells)
        self.upright = all(len(name) <= len(AROUND) for name in self.columns)
        longest = max(_measure_text(name, LABEL) for name in self.columns)
        self.head = 0.3 + (0.2 if self.upright else longest + 0.1)
        self.height = self.head + len(self.rows) * CELL[1]

    def draw(self, figure: Any, left: float, top: float) -> None:
        """Draws the map so that its cells begin `left` inches from the edge of the figure."""
        size = len(self.columns) * CELL[0], len(self.rows) * CELL[1]
        axes = _add_axes(figure, left, top + self.head, *size)
        values = [
            [self.cells.get((row, name), math.nan) for name in self.columns] for row in self.rows
        ]
        axes.imshow(values, cmap=_make_ramp(), vmin=0, vmax=1, aspect="auto")
        _add_text(figure, left, top, self.caption)
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=0 if self.upright else 90)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.tick_params(length=0, labelsize=LABEL, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        for names, draw_line in ((self.columns, axes.axvline), (self.rows, axes.axhline)):
            for i in range(len(names) + 1):
                draw_line(i - 0.5, color="white", linewidth=1.5)
        for (place, name), value in self.cells.items():
            _draw_number(axes, self.columns.index(name), self.rows.index(place), value)


def _draw_number(axes: Any, x: int, y: int, value: float) -> None:
    """The number in a cell; hatching where chance alone gives an overlap of 1."""
    from matplotlib.patches import Rectangle

    if math.isnan(value):
        corner = (x - 0.5, y - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=EMPTY, hatch="///", zorder=0))
        return
    ink = "white" if value > 0.6 else "#202020"
    axes.text(
        x, y, f"{round(value, 2) + 0.0:.2f}", size=NUMBER, color=ink, ha="center", va="center"
    )


def _draw_legend(figure: Any, left: float, top: float, has_empty: bool) -> None:
    """What the colours mean."""
    from matplotlib.patches import Rectangle

    axes = _add_axes(figure, left, top, *BAR)
    axes.imshow(
        [[i / 255 for i in range(256)]], cmap=_make_ramp(), aspect="auto", extent=(0, 1, 0, 1)
    )
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.tick_params(length=2, labelsize=LABEL)
    axes.spines[:].set_visible(False)
    _add_text(figure, left, top + BAR[1] + 0.26, "0: as unrelated weights, 1: equal subspaces")
    if has_empty:
        swatch = _add_axes(figure, left + BAR[0] + 0.5, top, CELL[0] / 2, BAR[1])
        swatch.set_axis_off()
        swatch.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=EMPTY, hatch="///"))
        text = "no number: the subspaces fill their space, so chance gives 1"
        _add_text(figure, left + BAR[0] + 0.5, top + BAR[1] + 0.08, text)


def _add_axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place of the figure, in inches from its upper left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))


def _add_text(figure: Any, left: float, top: float, text: str) -> None:
    """A line of text below a point of the figure, in inches from its upper left corner."""
    wide, high = figure.get_size_inches()
    figure.text(left / wide, 1 - top / high, text, size=LABEL, va="top")


def _measure_text(text: str, size: float) -> float:
    """The width of a line of text in inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().width) / 72


def _make_ramp() -> Any:
    """The colours of an overlap above chance; below 0 as 0, and none where there is no number."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("overlap", RAMP)


def _sort_columns(table: Cells) -> list[str]:
    """The columns in order: numbers by value, modules in blocks by layer, then those around."""
    return sorted(dict.fromkeys(name for _, name in table), key=column_order)
