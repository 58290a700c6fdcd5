"""Which programs read a LoRA file, and which format a program reads; the data is the families'."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ...architectures.families import find_title, known_families
from ...architectures.family import Family, Spelling
from ...errors import UnsupportedFormat

PROGRAMS = {
    "comfyui": "ComfyUI",
    "a1111": "A1111",
    "forge": "Forge",
    "invokeai": "InvokeAI",
    "musubi": "musubi",
    "sd-scripts": "sd-scripts",
}
"""What `format` takes -> the program's name in `Family.readers`. diffusers is a format too."""


def find_readers(
    families: Iterable[str],
    format: str,
    spelling: Spelling | None,
    modules: Collection[str] = (),
) -> list[str]:
    """The programs that read all of a LoRA file, as far as they were tried.

    Args:
        families: ids of those that the LoRA can be of.
        format: of the file.
        spelling: of a transformer's modules in it; None for a UNet.
        modules: canonical names of those that the file updates.
    """
    known = [family for id_ in families if (family := known_families().get(id_)) is not None]
    readers = [
        [
            program
            for program in _readers_of(family, format, spelling)
            if not any(n.startswith(family.gaps.get((program, format), " ")) for n in modules)
        ]
        for family in known
    ]
    if not readers:
        return []
    return [name for name in readers[0] if all(name in others for others in readers)]


def choose_format(families: Iterable[str], program: str) -> str:
    """The format of ours that a program reads best for a family.

    Args:
        families: ids of those that the LoRA can be of.
        program: a key of `PROGRAMS`, or "diffusers".

    Raises:
        UnsupportedFormat: it reads none of our formats for the family, or nothing is known of it.
    """
    name = PROGRAMS.get(program, program)
    known = [family for id_ in families if (family := known_families().get(id_)) is not None]
    if not known:
        raise UnsupportedFormat(
            f"which files {name} reads for this model is not known, because prolora does not know "
            "its family; name a format (`format`)"
        )
    shared = [
        format
        for format in known[0].readers.get(name, ())
        if all(format in family.readers.get(name, ()) for family in known)
    ]
    if not shared:
        titles = " or ".join(find_title(family.id) for family in known)
        able = ", ".join(known[0].readers) or "none that was tried"
        raise UnsupportedFormat(
            f"{name} reads no LoRA for {titles} that prolora writes; programs that do: {able}"
        )
    return shared[0]


def _readers_of(family: Family, format: str, spelling: Spelling | None) -> list[str]:
    if spelling is None or family.has_equal_names(spelling, family.spellings.get(format)):
        return [program for program, formats in family.readers.items() if format in formats]
    return [
        program
        for other, programs in family.also_read.items()
        if family.has_equal_names(spelling, other)
        for program in programs
    ]
