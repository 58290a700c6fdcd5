"""A picture of a comparison: overlap above chance by place and depth, and by place and module.

Needs Pillow (the `plot` extra), which is imported only to draw.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from ..comparison.comparison import Comparison, ModuleComparison, average_field
from ..errors import OutputError

_BLOCK = re.compile(r"((?:.+\.)?(?:single_)?transformer_blocks)\.(\d+)\.(.+)")
AROUND = "proj"  # the column of what stands around a stack of blocks: proj_in and proj_out

CELL, MARGIN, TEXT, SMALL = (38, 24), 24, 14, 11
# From pale to dark blue, in equal steps of overlap; no red and green, which some cannot tell apart.
RAMP = ((246, 241, 231), (203, 217, 232), (138, 178, 215), (66, 126, 184), (8, 48, 107))
NOTHING, INK = (255, 255, 255), (32, 32, 32)

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
        groups.setdefault(key(*_split_module(module.target)), []).append(module)
    return {found: average_field(modules, "above") for found, modules in groups.items()}


def _split_module(module: str) -> tuple[str, str, str]:
    """(place, depth, leaf); a UNet's place is the attention that holds a stack of blocks."""
    match = _BLOCK.fullmatch(module)
    if match:
        place = match[1].removesuffix(".transformer_blocks")
        return place, match[2], match[3]
    place, _, leaf = module.rpartition(".")
    return place, AROUND, leaf


def save_heatmap(comparison: Comparison, path: str | PathLike[str]) -> None:
    """Draws the two heat maps into a PNG file.

    Raises:
        OutputError: Pillow is missing, the comparison holds no overlaps, or the file cannot be
            written.
    """
    image = draw_heatmap(comparison)
    try:
        image.save(Path(path), format="PNG")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def check_pillow() -> None:
    """Raises OutputError, with the way out, where Pillow is not installed."""
    _import_pillow()


def _import_pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise OutputError('drawing needs Pillow: pip install "prolora[plot]"') from error
    return Image, ImageDraw, ImageFont


def draw_heatmap(comparison: Comparison) -> Any:
    """The picture, as a PIL image.

    Raises:
        OutputError: Pillow is missing, or the comparison holds no overlaps.
    """
    tables = [overlap_by_depth(comparison), overlap_by_module(comparison)]
    if all(math.isnan(value) for value in tables[0].values()):
        raise OutputError("there is no overlap to draw: compare without --quick")
    image_module, draw_module, font_module = _import_pillow()
    fonts = {size: font_module.load_default(size) for size in (TEXT, SMALL)}
    ruler = draw_module.Draw(image_module.new("RGB", (1, 1)))

    def width(text: str, size: int = SMALL) -> int:
        return int(ruler.textlength(text, fonts[size])) + 1

    rows = [list(dict.fromkeys(place for place, _ in table)) for table in tables]
    columns = [_sort_columns(table) for table in tables]
    left = max(width(name) for name in rows[0]) + 12
    wide = max(720, left + max(map(len, columns)) * CELL[0])
    heads = [max(width(name) for name in names) + 12 for names in columns]
    said = [
        line
        for sentence in (
            f"{comparison.source} against {comparison.target}",
            comparison.verdict.sentence(),
        )
        for line in textwrap.wrap(_replace_letters(sentence), wide // 8)
    ]
    top = MARGIN + len(said) * (TEXT + 6) + 16
    heights = [
        28 + head + len(names) * CELL[1] + 20 for head, names in zip(heads, rows, strict=True)
    ]
    picture = image_module.new("RGB", (wide + 2 * MARGIN, top + sum(heights) + 60), NOTHING)
    pen = draw_module.Draw(picture)
    for i, line in enumerate(said):
        pen.text((MARGIN, MARGIN + i * (TEXT + 6)), line, INK, fonts[TEXT])
    titles = ("overlap above chance by place and depth", "by place and kind of module")
    for number, table in enumerate(tables):
        pen.text((MARGIN, top), titles[number], INK, fonts[TEXT])
        corner = (MARGIN + left, top + 28 + heads[number])
        for x, name in enumerate(columns[number]):
            label = image_module.new("RGB", (heads[number], SMALL + 6), NOTHING)
            draw_module.Draw(label).text((6, 1), name, INK, fonts[SMALL])
            at = (corner[0] + x * CELL[0] + (CELL[0] - SMALL - 6) // 2, corner[1] - heads[number])
            picture.paste(label.rotate(90, expand=True), at)
        for y, place in enumerate(rows[number]):
            middle = corner[1] + y * CELL[1] + CELL[1] // 2
            pen.text((MARGIN, middle), place, INK, fonts[SMALL], anchor="lm")
            for x, name in enumerate(columns[number]):
                if (place, name) in table:
                    cell = (corner[0] + x * CELL[0], corner[1] + y * CELL[1])
                    _draw_cell(pen, cell, table[place, name], fonts[SMALL])
        top += heights[number]
    _draw_legend(pen, (MARGIN + left, top), fonts[SMALL])
    return picture


def _sort_columns(table: Cells) -> list[str]:
    """The columns in order: numbers by value, then names as they come."""
    names = list(dict.fromkeys(name for _, name in table))
    numbers = sorted((name for name in names if name.isdigit()), key=int)
    return numbers + [name for name in names if not name.isdigit()]


def _draw_cell(pen: Any, corner: tuple[int, int], value: float, font: Any) -> None:
    """One cell with its number; a cross where chance alone gives 1 and nothing can be said."""
    x, y = corner
    box = (x, y, x + CELL[0] - 2, y + CELL[1] - 2)
    if math.isnan(value):
        pen.rectangle(box, NOTHING, RAMP[1])
        pen.line((box[0], box[3], box[2], box[1]), RAMP[1])
        return
    colour = shade_cell(value)
    pen.rectangle(box, colour)
    ink = NOTHING if sum(colour) < 400 else INK
    pen.text((x + CELL[0] // 2 - 1, y + CELL[1] // 2 - 1), f"{value:.2f}", ink, font, anchor="mm")


def _draw_legend(pen: Any, corner: tuple[int, int], font: Any) -> None:
    """The colours and what they mean."""
    x, y = corner
    for i in range(200):
        pen.line((x + i, y, x + i, y + 12), shade_cell(i / 199))
    for i, text in ((0, "0: as unrelated weights"), (200, "1: equal subspaces")):
        pen.text((x + i, y + 18), text, INK, font, anchor="la")


def shade_cell(value: float) -> tuple[int, int, int]:
    """The colour of an overlap above chance; below 0 as 0."""
    position = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(position), len(RAMP) - 2)
    part = position - i
    r, g, b = (
        round(low + part * (high - low)) for low, high in zip(RAMP[i], RAMP[i + 1], strict=True)
    )
    return r, g, b


def _replace_letters(text: str) -> str:
    """The letters that the built-in font has."""
    return text.encode("latin-1", "replace").decode("latin-1")
