"""The whole page of a report: the verdict, the picture, the tables, and how it was made."""

from __future__ import annotations

import base64
import hashlib
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import TYPE_CHECKING

import torch

from ...core.means import weighted_mean
from ...files.ownership import make_mark
from ...version import __version__
from .block_tables import crossed_table, write_decisions
from .drawing import draw_legend, draw_map
from .markup import Html, join, tag
from .module_tables import (
    LEGEND,
    describe_module,
    module_table,
    stage_table,
    write_number,
    write_reasons,
)
from .place_map import PlaceMap, share_kept

if TYPE_CHECKING:
    from ..report import Report


@dataclass(frozen=True)
class Picture:
    """An image to embed.

    Attributes:
        png: the bytes of a PNG file.
        caption: what it shows, in a sentence; also its text alternative.
    """

    png: bytes
    caption: str


def render_report(
    report: Report, facts: Mapping[str, str] | None = None, pictures: Iterable[Picture] = ()
) -> str:
    """A report as one HTML file, which loads nothing.

    Args:
        report: what was kept and lost.
        facts: more of how it was made, by what each is called: the LoRA's file, the command.
        pictures: shown below the verdict.
    """
    places = PlaceMap(report.modules, report.dry_run)
    sections = [_draw_tiles(report), *map(_embed_picture, pictures)]
    if report.modules:
        sections.append(_map_section(places))
    if report.rows("mapped") and not report.dry_run:
        sections.append(tag("section", tag("h2", "By part of the model"), stage_table(report)))
    for heading, table in (
        ("What crossed between the latents", crossed_table(report)),
        ("Where blocks came from", write_decisions(report)),
    ):
        if table is not None:
            sections.append(tag("section", tag("h2", heading), table))
    sections.append(_unmoved_section(report))
    if report.modules:
        sections.append(_module_section(report))
    sections.append(facts_section(list_facts(report) | dict(facts or {})))
    heading = write_headline(report)
    head = tag(
        "header",
        tag("p", "LoRA transfer report", class_="eyebrow"),
        tag("h1", heading),
        _list_sentences(report),
    )
    return make_page(f"{report.source} → {report.target}", join([head, tag("main", *sections)]))


def write_headline(report: Report) -> str:
    """The result in a sentence."""
    share = kept_of_all(report)
    if share is None:
        return report.sentences()[0]
    sentence = report.sentences()[0]
    moved = sentence.split(" moved ")[0]
    return f"{share:.0%} of the LoRA's energy is on {report.target}: {moved} moved."


def kept_of_all(report: Report) -> float | None:
    """The share of the LoRA's energy that is on the target; None where it is not known."""
    mapped = report.rows("mapped")
    total = report.totals["energy_mapped"]
    shares = [(row.energy, share_kept([row])) for row in mapped]
    if report.dry_run or total is None or any(share is None for _, share in shares):
        return None
    mean = weighted_mean(shares)
    return None if mean is None else total * mean


def _list_sentences(report: Report) -> Html:
    """The sentences of the report, but for one that is the headline; a warning stands out."""
    heading = write_headline(report)
    return tag(
        "ul",
        *(
            tag("li", sentence, class_="warn" if sentence.startswith("No-go") else None)
            for sentence in report.sentences()
            if sentence != heading
        ),
        class_="sentences",
    )


def _draw_tiles(report: Report) -> Html:
    """The numbers that people ask for first."""
    totals = report.totals
    placed = totals["mapped"]
    name = "modules to move" if report.dry_run else "modules moved"
    tiles = [
        (name, f"{report.coverage:.0%}", f"{placed} in all, {totals['skipped']} skipped"),
        ("method", report.method, f"strength {report.strength:.2g}"),
    ]
    if not report.dry_run:
        tiles += [
            (
                "energy kept",
                write_number(totals["energy_surviving"], ".0%"),
                "of the modules that moved",
            ),
            ("away from copying", write_number(totals["copy_distance"], ".0%"), "of the norm"),
        ]
    if report.verdict is not None:
        drift = write_number(_none_of_nan(report.verdict.drift))
        cosine = write_number(_none_of_nan(report.verdict.cosine))
        tiles.append(("drift of the bases", drift, f"cosine {cosine}"))
    boxes = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), " ", tag("small", note)))
        for name, value, note in tiles
    ]
    return tag("dl", *boxes, class_="tiles")


def _none_of_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _map_section(places: PlaceMap) -> Html:
    hint = (
        "A column for each block in the order of the model, a row for each kind of module. "
        "A cell names its module, and leads to its row of the table below."
    )
    describe = partial(describe_module, is_planned=places.is_planned)
    heading = "What would move, by place" if places.is_planned else "What was kept, by place"
    figure = tag(
        "figure",
        tag("div", draw_map(places, describe), class_="heat"),
        tag("p", "\u00a0", id="readout", aria_live="polite", hidden=True),
        draw_legend(places),
        tag("figcaption", hint),
    )
    return tag("section", tag("h2", heading), figure)


def _unmoved_section(report: Report) -> Html:
    """What did not move: modules by reason, tensors by name."""
    parts: list[Html] = []
    table = write_reasons(report)
    if table is not None:
        parts.append(table)
    if report.left_out:
        items = [
            tag("li", tag("code", name), ": ", reason) for name, reason in report.left_out.items()
        ]
        summary = tag("summary", f"{len(items)} tensors of the file stay behind")
        parts.append(tag("details", summary, tag("ul", *items)))
    if report.dropped_blocks:
        names = ", ".join(report.dropped_blocks)
        parts.append(tag("p", f"Blocks of the source that feed none: {names}."))
    if not parts:
        parts.append(tag("p", "Every module of the LoRA has a place on the target."))
    heading = "What would not move" if report.dry_run else "What did not move"
    return tag("section", tag("h2", heading), *parts)


def _module_section(report: Report) -> Html:
    meanings = [join([tag("dt", name), tag("dd", text)]) for name, text in LEGEND]
    legend = tag("details", tag("summary", "What the columns mean"), tag("dl", *meanings))
    return tag("section", tag("h2", "Every module"), legend, module_table(report))


def facts_section(facts: Mapping[str, str]) -> Html:
    """How the result was made."""
    items = [
        join([tag("dt", name), tag("dd", tag("code", text) if _is_code(name) else text)])
        for name, text in facts.items()
        if text
    ]
    return tag("section", tag("h2", "How it was made"), tag("dl", *items, class_="facts"))


def _is_code(name: str) -> bool:
    return name == "command" or "digest" in name or name == "recipe"


def list_facts(report: Report) -> dict[str, str]:
    """How a result was made, by what each fact is called: bases, digests, options, versions."""
    origin = report.provenance
    seconds = sum(report.seconds.values())
    facts = {
        "source base": report.source,
        "digest of the source": origin.get("source_hash", ""),
        "target base": report.target,
        "digest of the target": origin.get("target_hash", ""),
        "digest of the LoRA": origin.get("lora_hash", ""),
        "method": f"{report.method}, asked for: {report.asked}" if report.asked else report.method,
        "strength": f"{report.strength:.4g}",
        "damping κ": "" if report.damping is None else f"{report.damping:.4g}",
        "rank of the subspaces": f"{report.rank_rule:g}",
        "threshold on Φ": f"{report.threshold:g}",
        "match": report.match,
        "recipe": origin.get("recipe", ""),
        "versions": f"prolora {origin.get('version', __version__)}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "time": f"{seconds:.1f} s" if seconds else "",
    }
    return {name: text for name, text in facts.items() if text}


def _embed_picture(picture: Picture) -> Html:
    data = base64.b64encode(picture.png).decode("ascii")
    image = tag("img", src=f"data:image/png;base64,{data}", alt=picture.caption)
    return tag("figure", image, tag("figcaption", picture.caption))


def make_page(title: str, body: Html) -> str:
    """A complete document around its content.

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
        tag("meta", name="prolora", content=make_mark("report")),
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
    """A file beside this one."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """As a content security policy names a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
