"""How `prolora inspect` shows a description to people; `--json` has everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from ..adapters.algorithms import forms
from ..workflow.inspection import Description

_FAMILIES = {
    "sd15": "SD1.x",
    "sd21": "SD2.x",
    "bk-sdm": "BK-SDM (pruned SD1.5)",
    "sdxl": "SDXL",
    "ssd-1b": "SSD-1B",
    "segmind-vega": "Segmind Vega",
    "flux": "FLUX.1",
    "sd3": "SD3",
    "pixart": "PixArt",
}
_SPELLINGS = {"sgm": "the original checkpoint's module names", "diffusers": "diffusers' names"}
_MOST = 4  # values of a kind shown in one cell


def description_parts(description: Description) -> Iterator[RenderableType]:
    """What to print, from top to bottom; fits 80 columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _list_facts(description):
        table.add_row(name, text)
    yield table
    if description.places:
        yield _component_table(description)


def _list_facts(found: Description) -> Iterator[tuple[str, str]]:
    """The lines above the table: (name, text)."""
    yield "file", Path(found.path).name or found.path
    yield "what", _describe_kind(found)
    if found.family or found.family_claimed or found.kind != "unknown":
        yield "for", _family_text(found)
    if found.base_model or found.base_hash:
        known = [found.base_model or "unnamed"]
        known += [f"hash {found.base_hash[:16]}"] if found.base_hash else []
        yield "base", ", ".join(known)
    yield "prolora", _support_text(found)
    yield from _vector_facts(found)
    for reason, number in found.left_out.items():
        yield "stays behind", f"{number} × {reason}"
    if found.types:
        yield "layers", _counts_text(found.types, most=6)
    size = f", {_file_size_text(found.size)}" if found.size else ""
    yield "stored", f"{_count_text(found.tensors, 'tensor')}{size}: {_counts_text(found.dtypes)}"
    if found.trigger_words:
        yield "trigger words", ", ".join(found.trigger_words)


def _describe_kind(found: Description) -> str:
    spelling = _SPELLINGS.get(found.spelling or "", "")
    if found.kind == "lora":
        total = _count_text(sum(place.updates for place in found.places.values()), "update")
        # Where a file is refused, the type may be another than the one prolora reads by that name.
        said = map(_algorithm_text, found.algorithms) if found.supported else found.algorithms
        kinds = " and ".join(said) or "adapter"
        return f"{kinds}, {total}; {found.format or 'unknown'} format, {spelling}"
    if found.kind == "base":
        total = _count_text(sum(found.modules.values()), "weight matrix", "weight matrices")
        return f"base model, {found.format}, {total}"
    return "neither an adapter nor a base model that prolora knows"


def _algorithm_text(algorithm: str) -> str:
    """`lora+dora` in words."""
    plain, _, dora = algorithm.partition("+")
    return ("DoRA on a " if dora else "") + forms.ALGORITHM_NAMES.get(plain, plain)


def _count_text(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _file_size_text(size: int) -> str:
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if size >= unit
    )
    return f"{size / unit:.3g} {name}"


def _family_text(found: Description) -> str:
    claimed = _FAMILIES.get(found.family_claimed or "", found.family_claimed)
    if found.family is None:
        return (
            f"{claimed}, as its metadata says"
            if claimed
            else "unknown: neither names nor metadata tell"
        )
    name = _FAMILIES.get(found.family, found.family)
    if claimed and found.family_claimed not in (found.family, _parent_family(found.family)):
        return f"{name}, by its module names and shapes; its metadata says {claimed}"
    return name


def _parent_family(family: str) -> str:
    """What the metadata of a pruned family's LoRAs says: the family it was pruned from."""
    return {"ssd-1b": "sdxl", "segmind-vega": "sdxl", "bk-sdm": "sd15"}.get(family, family)


def _support_text(found: Description) -> str:
    if found.kind == "base":
        return "can use it as --source and --target" if found.supported else f"no: {found.reason}"
    if not found.supported:
        return f"cannot transfer it: {(found.reason or '').removeprefix(f'{found.path}: ')}"
    if found.needs_base:
        return "can transfer it; its updates depend on the base it was trained on (--source)"
    return "can transfer it and convert it to any format that has its modules"


def _vector_facts(found: Description) -> Iterator[tuple[str, str]]:
    words = {
        "bias": ("trained bias", "trained biases"),
        "norm": ("weight of a normalisation layer", "weights of normalisation layers"),
    }
    said = [_count_text(number, *words[kind]) for kind, number in found.vectors.items()]
    if said:
        yield "also", " and ".join(said)


def _component_table(found: Description) -> Table:
    """A row for each part of the pipeline."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("component", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in ("algorithm", "rank", "alpha", "scale"):
        table.add_column(name, overflow="fold")
    for name, place in found.places.items():
        cells = (place.algorithms, place.ranks, place.alphas, place.scales)
        table.add_row(name, str(place.updates), *(_counts_text(c) for c in cells))
    return table


def _counts_text(
    values: Mapping[object, int] | Mapping[str, int] | Mapping[int, int], most: int = _MOST
) -> str:
    """`16 ×600, 8 ×122`, the most frequent first; one value needs no count."""
    if not values:
        return "–"
    if len(values) == 1:
        return str(next(iter(values)))
    ordered = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{value} ×{number}" for value, number in ordered[:most])
    return f"{shown}, {len(ordered) - most} more" if len(ordered) > most else shown
