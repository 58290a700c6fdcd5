"""Writes the tables of docs/formats.md that say which programs read what prolora writes.

    python docs/make_formats.py [--check]

They stand between two comments of the page and come from `prolora.architectures.loaders`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prolora.architectures.families import known_families
from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import find_reach, known_loaders, name_row

PAGE = Path(__file__).parent / "formats.md"
BEGIN, END = "<!-- made by docs/make_formats.py -->\n", "<!-- end -->\n"


def write_tables() -> str:
    """The programs with their versions, and a row for every family."""
    programs = known_loaders()
    lines = ["| `--for` | program | version |", "|---|---|---|"]
    lines += [f"| `{id_}` | {one.title} | {one.version} |" for id_, one in programs.items()]
    titles = [one.title for one in programs.values()]
    lines += ["", "| family | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for family in (one for every in known_families().values() for one in every.as_loaded):
        cells = [_write_cell(family, program) for program in programs]
        if any(cells):  # else no program was tried with its models
            lines.append(
                f"| {family.title} |" + "|".join(cell and f" {cell} " for cell in cells) + "|"
            )
    return "\n".join(lines) + "\n"


def _write_cell(family: Family, program: str) -> str:
    """The formats that a program reads whole, those that it reads in part in parentheses."""
    usual = [name for id_ in family.layouts[:1] for name in load_layout(id_).adapted]
    reach = {
        format: find_reach(family, name_row(family, format, spelling), usual).get(program)
        for format, spelling in family.spellings.items()
    }
    if set(reach.values()) == {None}:
        has_models = program in find_reach(family, "of nobody's spelling", usual)
        return "not whole" if has_models else ""
    cells = [format for format, how in reach.items() if how == "whole"]
    part = [format for format, how in reach.items() if how == "part"]
    cells += [f"({', '.join(part)})"] if part else []
    return ", ".join(cells) or "none"


def main() -> None:
    """Writes or checks the page."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = before + BEGIN + "\n" + write_tables() + "\n" + END + after
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(made, "utf-8")
    elif made != text:
        sys.exit("docs/formats.md differs from the data: run python docs/make_formats.py")


if __name__ == "__main__":
    main()
