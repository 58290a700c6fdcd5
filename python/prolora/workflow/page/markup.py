"""HTML in which every text is escaped, unless it was made here.

Names of modules and files, metadata and reasons are written by others. A text becomes markup only
through `tag`, so that none can be forgotten.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

Attribute = str | int | float | bool | None

# No character of these has a place in a page: C0 and C1 controls, marks of direction, line and
# paragraph separators, half characters, and what Unicode says is no character.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
_VOID = {"meta", "img", "input", "br", "wbr"}
_EMPTY = {"rect", "path"}  # of SVG


class Html(str):
    """Markup: escaped already."""

    __slots__ = ()


def escape(text: object) -> Html:
    r"""Escapes a text as HTML with control characters as `\x1b`; markup stays."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(replace_controls(str(text)), quote=True))


def replace_controls(text: str) -> str:
    r"""Replaces control characters by `\x1b` and the like; tabs and newlines stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def join(parts: Iterable[object]) -> Html:
    """Joins parts and escapes those that are no markup."""
    return Html("".join(map(escape, parts)))


def tag(name: str, /, *children: object, **attributes: Attribute) -> Html:
    """Makes an element.

    Args:
        name: of the element.
        *children: texts, which are escaped, and markup.
        **attributes: by name, "_" for "-" and a last "_" for nothing (`class_`). True stands for
            an attribute without a value; None and False leave it out.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head += f" {key}" if value is True else f' {key}="{escape(value)}"'
    if name in _EMPTY and not children:
        return Html(f"<{head}/>")
    if name in _VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(children)}</{name}>")


def break_name(name: str) -> Html:
    """Lets a module's name break after each dot."""
    return Html(escape(name).replace(".", ".<wbr>"))
