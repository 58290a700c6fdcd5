"""Names that people give a base: fine-tunes and versions, beside the ids of families and sizes."""

from __future__ import annotations

from typing import NamedTuple

from .families import find_title, join_titles, known_families
from .layouts import known_layouts


class NamedBase(NamedTuple):
    """A base that is meant by its name alone.

    Attributes:
        title: for people, for example "Pony Diffusion V6 XL".
        sizes: ids of the published sizes that it can be.
        note: how it is related to these, for example "loads SDXL files as they are"; "" if it is
            one of them.
    """

    title: str
    sizes: tuple[str, ...]
    note: str = ""


def _tune(title: str, size: str, of: str) -> NamedBase:
    return NamedBase(title, (size,), f"loads {of} files as they are")


ALIASES = {
    "pony": _tune("Pony Diffusion V6 XL", "sdxl", "SDXL"),
    "illustrious": _tune("Illustrious XL", "sdxl", "SDXL"),
    "noobai": _tune("NoobAI-XL", "sdxl", "SDXL"),
    "animagine": _tune("Animagine XL", "sdxl", "SDXL"),
    "sdxl-turbo": _tune("SDXL Turbo", "sdxl", "SDXL"),
    "sdxl-lightning": _tune("SDXL Lightning", "sdxl", "SDXL"),
    "pony-v7": _tune("Pony V7", "auraflow", "AuraFlow"),
    "flux1-krea": _tune("FLUX.1 Krea [dev]", "flux1-dev", "FLUX.1 [dev]"),
    "flux1-kontext": _tune("FLUX.1 Kontext [dev]", "flux1-dev", "FLUX.1 [dev]"),
    "z-image-turbo": _tune("Z-Image-Turbo", "z-image", "Z-Image"),
    "krea2-turbo": _tune("Krea 2 Turbo", "krea2", "Krea 2"),
    "qwen-image-edit": _tune("Qwen-Image-Edit", "qwen-image", "Qwen-Image"),
    "qwen-image-edit-2509": _tune("Qwen-Image-Edit-2509", "qwen-image", "Qwen-Image"),
    "qwen-image-edit-2511": _tune("Qwen-Image-Edit-2511", "qwen-image", "Qwen-Image"),
    "qwen-image-2512": _tune("Qwen-Image-2512", "qwen-image", "Qwen-Image"),
    "hidream-e1": _tune("HiDream-E1", "hidream-i1", "HiDream-I1"),
    "sd1.5": NamedBase("Stable Diffusion 1.5", ("sd15",)),
    "sd2.1": NamedBase("Stable Diffusion 2.1", ("sd21",)),
    "sd3.5": NamedBase("Stable Diffusion 3.5", ("sd3.5-medium", "sd3.5-large")),
    "flux2-klein": NamedBase("FLUX.2 [klein]", ("flux2-klein-4b", "flux2-klein-9b")),
    "ltx-2": NamedBase("LTX-2", ("ltx2",)),
    "ltx-2.3": NamedBase("LTX-2.3", ("ltx2.3",)),
    "ltx-2.5": NamedBase("LTX-2.5", ("ltx2.5",)),
    "wan2.1": NamedBase(
        "Wan 2.1", ("wan-t2v-14b", "wan-t2v-1.3b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b")
    ),
    "wan2.1-t2v-1.3b": NamedBase("Wan 2.1 T2V 1.3B", ("wan-t2v-1.3b",)),
    "wan2.1-t2v-14b": NamedBase("Wan 2.1 T2V 14B", ("wan-t2v-14b",)),
    "wan2.2": NamedBase("Wan 2.2", ("wan-t2v-14b", "wan2.2-i2v-14b", "wan2.2-ti2v-5b")),
    "wan2.2-t2v-a14b": NamedBase("Wan 2.2 T2V A14B", ("wan-t2v-14b",)),
    "wan2.2-i2v-a14b": NamedBase("Wan 2.2 I2V A14B", ("wan2.2-i2v-14b",)),
}
"""Name in small letters -> what it means. Ids of families and sizes need no row here."""


def list_base_names() -> tuple[str, ...]:
    """Lists all names that `find_named` knows."""
    return (*known_families(), *known_layouts(), *ALIASES)


def find_named(name: str) -> NamedBase | None:
    """Returns the base that a name means, in any case; None for a name that is not known.

    "FLUX.1-dev" means flux1-dev, and "Illustrious XL" or "illustrious_xl" means illustrious.
    """
    id_ = name.lower().replace("flux.", "flux").replace("_", "-").replace(" ", "-")
    for own in (id_, id_.removesuffix("-xl"), id_.removesuffix("-dev")):
        if own in ALIASES:
            return ALIASES[own]
        if family := known_families().get(own):
            return NamedBase(family.title, family.layouts)
        if own in known_layouts():
            return NamedBase(find_title(own), (own,))
    return None


def join_sizes(sizes: tuple[str, ...], families: tuple[str, ...]) -> str:
    """Returns what a LoRA is for, in words, with its version where the sizes tell.

    For example "LTX-2.3 or LTX-2.5", and "Wan 14B" for more than three sizes of 14B.
    """
    titles = list(dict.fromkeys(map(find_title, sizes)))
    if len(titles) == 1:
        return titles[0]
    if len(families) == 1 and sizes:
        if len(titles) <= 3:
            return join_titles(titles)
        ends = {size.rpartition("-")[2] for size in sizes}
        if len(ends) == 1 and (end := ends.pop())[:1].isdigit():
            return f"{find_title(families[0])} {end.upper()}"
    return join_titles(map(find_title, families))
