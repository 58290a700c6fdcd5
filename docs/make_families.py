"""Writes the tables of docs/families.md: what every family is, and which programs read it.

python docs/make_families.py            # write the page
python docs/make_families.py --check    # exit 1 where the page differs from the data
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from prolora.adapters.keys.codec import Codec
from prolora.architectures.families import known_families
from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import find_reach, known_loaders, list_programs, name_row
from prolora.architectures.shared_names import find_unet_names

PAGE = Path(__file__).resolve().parent / "families.md"
BEGIN = "<!-- made by docs/make_families.py -->"
FORMATS = ("comfy", "kohya", "diffusers")
_ATTENTION = ("attn.to_q", "attn1.to_q", "attention.to_q", "attn.wq", "to_q", "attn")


def write_page() -> str:
    """The introduction, which people write above BEGIN, and the tables."""
    families = sorted(known_families().values(), key=lambda family: family.title.lower())
    programs = known_loaders()
    lines = [
        PAGE.read_text("utf-8").partition(BEGIN)[0] + BEGIN,
        "",
        "## The families",
        "",
        "Matrices are weights of two or more axes. A program reads all of the formats beside it,",
        "and parts of those in parentheses ([formats.md](formats.md) says how this was measured).",
        "The last column is a query of the first block, as each format names it; in a fused matrix",
        "it is the first rows.",
        "",
        "| family (`id`) | sizes: matrices, parameters | program: formats that it reads | module |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {_title(one)} | {_sizes(one)} | {_programs(one)} | {_spellings(one)} |"
        for one in families
    ]
    lines += ["", "## The programs", "", "| `--for` | program | version |", "|---|---|---|"]
    lines += [f"| `{id_}` | {one.title} | {one.version} |" for id_, one in programs.items()]
    return "\n".join(lines) + "\n"


def _title(family: Family) -> str:
    return f"{family.title} (`{family.id}`)"


def _sizes(family: Family) -> str:
    sizes = []
    for id_ in family.layouts:
        layout = load_layout(id_)
        parameters = 0
        for shape in layout.shapes.values():
            count = 1
            for length in shape:
                count *= length
            parameters += count
        sizes.append(f"{layout.title}: {len(layout.shapes):,}, {parameters / 1e9:.2f} B")
    return "<br>".join(sizes)


def _programs(family: Family) -> str:
    rows = []
    for group, (id_, program) in product(family.as_loaded, known_loaders().items()):
        title = f" ({group.title})" if family.groups else ""
        if formats := _list_formats(group, id_):
            rows.append(f"{program.title}{title}: {formats}")
    return "<br>".join(rows) or "not tried"


def _list_formats(family: Family, program: str) -> str:
    """The formats that a program reads whole, those that it reads in part in parentheses."""
    usual = load_layout(family.layouts[0]).adapted
    reach = {
        format: find_reach(family, name_row(family, format, spelling), usual).get(program)
        for format, spelling in family.spellings.items()
    }
    if set(reach.values()) == {None}:
        has_models = program in list_programs(family.id)
        return "not whole" if has_models else ""
    formats = [format for format, amount in reach.items() if amount == "whole"]
    part = [format for format, amount in reach.items() if amount == "part"]
    formats += [f"({', '.join(part)})"] if part else []
    return ", ".join(formats) or "none"


def _spellings(family: Family) -> str:
    module = _first_query(family)
    names = find_unet_names(load_layout(family.layouts[0]).shapes) if family.unet else family
    paths = []
    for format in FORMATS:
        spelling = family.spellings.get(format)
        if path := spelling and Codec(names, spelling=spelling).write(module):
            paths.append(f"`{path}`")
    return "<br>".join(paths)


def _first_query(family: Family) -> str:
    """The first query of the family's first size, or its first module in a block."""
    names = [name for name in load_layout(family.layouts[0]).shapes if ".0." in name]
    for part in _ATTENTION:
        for name in names:
            if part in name:
                return name
    return names[0]


def main() -> None:
    """Writes or checks the page."""
    text = write_page()
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(text, "utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != text:
        sys.exit("docs/families.md differs from the data: run python docs/make_families.py")


if __name__ == "__main__":
    main()
