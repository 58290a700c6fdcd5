"""A `Report` as HTML, with every text escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, pass_context
from markupsafe import Markup, escape

from ...core.controls import replace_controls
from ...version import __version__


def render_page(report: Any, facts: Mapping[str, str], spell: Callable[[str], str]) -> str:
    """Renders one HTML file, which loads nothing.

    The policy lets nothing run but this script and nothing style but this sheet, by their digests.
    """
    style, script = Markup(_read_asset("style.css")), Markup(_read_asset("script.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    context: dict[str, Any] = {
        "style": style,
        "script": script,
        "policy": policy,
        "version": __version__,
    }
    context |= {"report": report, "words": report.in_words(), "spell": spell, "facts": facts}
    return _environment().get_template("page.html").render(**context)


@cache
def _environment() -> Environment:
    """Makes an environment that spells and escapes each text, and refuses unknown names."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"png": _embed_png, "is_tiny": _is_tiny, "breakable": _break_name}
    environment.loader = FunctionLoader(_read_asset)
    return environment


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """Returns a text in the reader's words, without control characters; markup stays."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return replace_controls(context["spell"](value))


def _break_name(text: str) -> str:
    """Lets a long module name break after each dot."""
    if text.count(".") <= 2 or " " in text:
        return text
    return escape(replace_controls(text)).replace(".", Markup(".<wbr>"))


def _embed_png(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _is_tiny(png: bytes) -> bool:
    """Returns True for an image that a browser would smooth to mud: its width is in the header."""
    return int.from_bytes(png[16:20], "big") < 64


@cache
def _read_asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """Digests a style or script for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
