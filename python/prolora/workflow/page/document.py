"""What a page holds, and the one template that draws it: a file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from ...version import __version__
from ..place_map import PlaceMap
from ..table import Cell, Column, Row, Table
from .drawing import draw_bar, draw_legend, draw_map, draw_thumbnail
from .markup import Html, break_name, join, tag

MODULES = "modules"
"""The id of the table that the map leads to."""

MAP_HINT = (
    "A column for each block in the order of the model, a row for each kind of module. A cell "
    "names its module, and leads to its row of the table below."
)


@dataclass(frozen=True)
class Picture:
    """An image to embed."""

    png: bytes  # the bytes of a PNG file
    caption: str  # what it shows, in a sentence; also its text alternative


@dataclass(frozen=True)
class PictureGrid:
    """Small images side by side."""

    columns: Sequence[str]  # headings
    rows: Sequence[str]  # what each row shows
    images: Sequence[Sequence[bytes]]  # PNG files, column by column
    caption: str  # what is to be seen, in a sentence


@dataclass(frozen=True)
class Fold:
    """What is shown on request: a line, and the names or terms behind it with what is said."""

    summary: str
    items: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A part of a page, from top to bottom."""

    heading: str  # of the part
    parts: Sequence[Table | str | Fold]  # tables, sentences and folded content
    id: str = ""  # of its table; the map leads to `MODULES`


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    title: str  # of the window
    eyebrow: str  # what kind of page it is
    headline: str  # the result in a sentence
    lines: Sequence[str] = ()  # what else to know at once
    sentences: Sequence[str] = ()  # the numbers behind it, in words
    pictures: Sequence[Picture] = ()  # below them
    grid: PictureGrid | None = None  # below these; None without one
    map: PlaceMap | None = None  # where in the model; None without one
    sections: Sequence[Section] = ()  # the rest
    # How the result was made, by the name of each fact
    facts: Mapping[str, str] = field(default_factory=dict)


def render_page(page: Page) -> str:
    """Renders one HTML file, which loads nothing."""
    head = [tag("p", page.eyebrow, class_="eyebrow"), tag("h1", page.headline)]
    head += [tag("p", line, class_="line") for line in page.lines]
    body: list[Html] = []
    body += map(_embed_picture, page.pictures)
    if page.grid:
        body.append(_draw_section("In images", [_draw_grid(page.grid)]))
    if page.sentences:
        body.append(_draw_section("In numbers", [_list_items(page.sentences, "sentences")]))
    if page.map and page.map.spots:
        body.append(_draw_section("By place", [_draw_figure(page.map)]))
    body += [_draw_section(s.heading, [_draw_part(part, s.id) for part in s.parts], s.id)
             for s in page.sections]  # fmt: skip
    body.append(_draw_section("How it was made", [_list_facts(page.facts)]))
    return _write_document(page.title, join([tag("header", *head), tag("main", *body)]))


def render_summary(page: Page) -> str:
    """Renders a page for a notebook: small, scriptless, in the notebook's style."""
    parts = [tag("p", tag("b", page.headline)), *(tag("p", line) for line in page.lines)]
    parts.append(_list_items(page.sentences))
    if page.map and page.map.spots:
        parts.append(draw_thumbnail(page.map, page.map.title, 640, 8))
    tables = (part for s in page.sections if s.id != MODULES for part in s.parts)
    parts += [write_table(table) for table in tables if isinstance(table, Table)]
    return str(join(parts))


def _draw_section(heading: str, parts: Sequence[Html], id: str = "") -> Html:
    return tag("section", tag("h2", heading), *parts, class_=id or None)


def _draw_part(part: Table | str | Fold, id: str) -> Html:
    if isinstance(part, str):
        return tag("p", part)
    if isinstance(part, Fold):
        return _draw_fold(part)
    legend = part.legend()
    table = write_table(part, id)
    return join([_draw_fold(Fold("What the columns mean", legend)), table]) if legend else table


def _draw_fold(fold: Fold) -> Html:
    items = [join([tag("dt", name), tag("dd", text)]) for name, text in fold.items.items()]
    return tag("details", tag("summary", fold.summary), tag("dl", *items))


def _list_items(sentences: Sequence[str], name: str | None = None) -> Html:
    return tag("ul", *(tag("li", sentence) for sentence in sentences), class_=name)


def _list_facts(facts: Mapping[str, str]) -> Html:
    items = [
        join([tag("dt", name), tag("dd", tag("code", text) if _is_code(name) else text)])
        for name, text in facts.items()
        if text
    ]
    return tag("dl", *items, class_="facts")


def _is_code(name: str) -> bool:
    return name == "command" or "digest" in name or name == "recipe"


def write_table(table: Table, id: str = "") -> Html:
    """Writes a table that scrolls if it is wider than the page.

    `id` is the table's; with "-frame" behind it the scrolling frame's.
    """
    heads = (tag("th", c.name, scope="col", class_=_find_class(c)) for c in table.columns)
    rows = (_draw_row(row, table.columns) for row in table.rows)
    parts = [tag("caption", table.title), tag("thead", tag("tr", *heads)), tag("tbody", *rows)]
    frame, label = f"{id}-frame" if id else None, table.title
    inner = tag("table", *parts, id=id or None)
    return tag("div", inner, class_="scroll", id=frame, tabindex=0, role="region", aria_label=label)


def _find_class(column: Column) -> str | None:
    return None if column.form is None else "n"


def _draw_row(row: Row, columns: Sequence[Column]) -> Html:
    first, *others = (_draw_cell(*pair) for pair in zip(columns, row.cells, strict=True))
    if row.below is not None:
        parts = [_list_items(row.below.sentences), write_table(row.below.table) if row.below.table
                 else ""]  # fmt: skip
        picture = draw_thumbnail(row.below.map, row.below.map.title) if row.below.map else ""
        details = tag("details", tag("summary", "more"), *parts) if row.below.sentences else ""
        first = join([first, picture, details])
    cells = [
        tag("td", cell, class_=_find_class(column))
        for column, cell in zip(columns[1:], others, strict=True)
    ]
    head = tag("th", first, scope="row", class_=_find_class(columns[0]))
    return tag("tr", head, *cells, id=row.anchor or None, class_=row.tone or None)


def _draw_cell(column: Column, cell: Cell) -> Html:
    text = column.write(cell)
    if column.has_bar and not isinstance(cell, str):
        return join([draw_bar(cell), text])
    # A long name of a module may go on in the next line.
    return break_name(text) if text.count(".") > 2 and " " not in text else join([text])


def _draw_figure(places: PlaceMap) -> Html:
    return tag(
        "figure",
        tag("div", draw_map(places), class_="heat"),
        tag("p", "\u00a0", id="readout", aria_live="polite", hidden=True),
        draw_legend(places),
        tag("figcaption", MAP_HINT),
    )


def _embed_picture(picture: Picture) -> Html:
    image = _embed_png(picture.png, picture.caption)
    return tag("figure", image, tag("figcaption", picture.caption))


def _embed_png(png: bytes, alt: str) -> Html:
    data = base64.b64encode(png).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{data}", alt=alt)


def _draw_grid(grid: PictureGrid) -> Html:
    """Draws a row of images below each prompt: five fit a telephone."""
    heads = (tag("th", name, scope="col") for name in grid.columns)
    rows: list[Html] = []
    for i, prompt in enumerate(grid.rows):
        name = prompt or "without a prompt"
        head = tag("th", name, scope="rowgroup", colspan=len(grid.columns))
        cells = (
            tag("td", _embed_png(images[i], f"{column}: {name}"))
            for column, images in zip(grid.columns, grid.images, strict=True)
        )
        rows.append(tag("tbody", tag("tr", head), tag("tr", *cells)))
    table = tag("table", tag("caption", "Images"), tag("thead", tag("tr", *heads)), *rows)
    return tag("figure", table, tag("figcaption", grid.caption), class_="grid")


def _write_document(title: str, body: Html) -> str:
    """Wraps content in a complete document.

    The policy lets nothing run but this script and nothing style but this sheet, by their digests,
    and lets nothing be fetched.
    """
    style, script = read_asset("style.css"), read_asset("script.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"prolora {__version__}"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – prolora"),
        Html(f"<style>{style}</style>"),
    )
    foot = tag("footer", f"Written by prolora {__version__}. This file loads nothing.")
    code = Html(f"<script>{script}</script>")
    page = tag("html", head, tag("body", body, foot, code), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


@cache
def read_asset(name: str) -> str:
    """Reads a file beside this one."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """Digests a style or script for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
