"""Writes docs/families.md: what every family is, from its file in `architectures/families`.

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
from prolora.architectures.loaders import find_reach, known_loaders, name_row
from prolora.architectures.shared_names import find_unet_names

PAGE = Path(__file__).resolve().parent / "families.md"
BEGIN = "<!-- made by docs/make_families.py -->"
FORMATS = ("comfy", "kohya", "diffusers", "peft")
_ATTENTION = ("attn.to_q", "attn1.to_q", "attention.to_q", "attn.wq", "to_q", "attn")


def write_page() -> str:
    """The introduction, which people write above BEGIN, and the tables."""
    families = sorted(known_families().values(), key=lambda family: family.title.lower())
    transformers = [family for family in families if not family.unet]
    lines = [
        PAGE.read_text("utf-8").partition(BEGIN)[0] + BEGIN,
        "",
        "## The families",
        "",
        "Matrices are weights of two or more axes. Programs are those that were tried and read the "
        "whole file",
        "([formats.md](formats.md) says how); a format that is missing is read by none of them.",
        "",
        "| family (`id`) | published sizes: matrices, parameters | format: read by |",
        "|---|---|---|",
    ]
    lines += [f"| {_title(one)} | {_sizes(one)} | {_formats(one)} |" for one in families]
    lines += [
        "",
        "## How one module is spelled",
        "",
        "A query of the first block, as each format names it. In a fused matrix it is the first "
        "rows.",
        "",
        "| family | comfy | kohya | diffusers |",
        "|---|---|---|---|",
    ]
    lines += [f"| {one.title} | {_spellings(one)} |" for one in transformers]
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


def _formats(family: Family) -> str:
    rows = []
    for format, group in product(FORMATS, family.as_loaded):
        row = name_row(group, format, family.spellings.get(format))
        usual = load_layout(group.layouts[0]).adapted
        reach = find_reach(group, row, usual) if format in family.spellings else {}
        whole = [one.title for id_, one in known_loaders().items() if reach.get(id_) == "whole"]
        if whole:
            title = f" ({group.title})" if family.groups else ""
            rows.append(f"`{format}`{title}: {', '.join(whole)}")
    return "<br>".join(rows) or "not tried"


def _spellings(family: Family) -> str:
    module = _first_query(family)
    names = find_unet_names(load_layout(family.layouts[0]).shapes) if family.unet else family
    cells = []
    for format in FORMATS[:3]:
        spelling = family.spellings.get(format)
        path = spelling and Codec(names, spelling=spelling).write(module)
        cells.append(f"`{path}`" if path else "–")
    return " | ".join(cells)


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
