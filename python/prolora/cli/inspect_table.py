"""How `prolora inspect` shows a description to people; `--json` has everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ..adapters.algorithms import forms
from ..adapters.formats.moves import describe_moves
from ..architectures.families import find_title
from ..workflow.inspection import Description
from ..workflow.tables import tabulate_components, write_counts
from .tables import draw_table

_SPELLINGS = {"sgm": "the original checkpoint's module names", "diffusers": "diffusers' names"}


def description_parts(description: Description) -> Iterator[RenderableType]:
    """What to print, from top to bottom; fits 80 columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _list_facts(description):
        table.add_row(name, text)
    yield table
    if description.places:
        yield draw_table(tabulate_components(description.places))


def _list_facts(description: Description) -> Iterator[tuple[str, str]]:
    """The lines above the table: (name, text)."""
    yield "file", Path(description.path).name or description.path
    yield "what", _describe_kind(description)
    if description.family or description.family_claimed or description.kind != "unknown":
        yield "for", _family_text(description)
    if description.base_model or description.base_hash:
        known = [description.base_model or "unnamed"]
        known += [f"hash {description.base_hash[:16]}"] if description.base_hash else []
        yield "base", ", ".join(known)
    if description.experts:
        high, low = description.experts
        yield "experts", f"{high} for high noise, {low} for low noise"
    if description.moves:
        last = description.moves[-1]
        how = f" (method {last.method})" if last.method else ""
        by = f"prolora {last.version}".rstrip()
        yield "moved", f"{describe_moves(description.moves)} by {by}{how}"
    yield "prolora", _support_text(description)
    if description.readers:
        yield "read by", ", ".join(description.readers)
    if description.part_readers:
        yield "in part by", ", ".join(description.part_readers)
    if description.non_readers:
        yield "not by", ", ".join(description.non_readers)
    yield from _vector_facts(description)
    for reason, number in description.left_out.items():
        yield "stays behind", f"{number} × {reason}"
    if description.types:
        yield "layers", write_counts(description.types, most=6)
    size = f", {_file_size_text(description.size)}" if description.size else ""
    yield (
        "stored",
        f"{_count_text(description.tensors, 'tensor')}{size}: {write_counts(description.dtypes)}",
    )
    if description.quantised:
        yield "quantised", description.quantised
    if description.trigger_words:
        yield "trigger words", ", ".join(description.trigger_words)


def _describe_kind(description: Description) -> str:
    spelling = _SPELLINGS.get(description.spelling or "", "")
    if description.kind == "lora":
        total = _count_text(
            sum(component.updates for component in description.places.values()), "update"
        )
        # Where a file is refused, the type may be another than the one prolora reads by that name.
        names = (
            map(_algorithm_text, description.algorithms)
            if description.supported
            else description.algorithms
        )
        kinds = " and ".join(names) or "adapter"
        return f"{kinds}, {total}; {description.format or 'unknown'} format, {spelling}"
    if description.kind == "base":
        total = _count_text(sum(description.modules.values()), "weight matrix", "weight matrices")
        return f"base model, {description.format}, {total}"
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


def _family_text(description: Description) -> str:
    claimed = find_title(description.family_claimed or "")
    if len(description.families) > 1:
        titles = " or ".join(map(find_title, description.families))
        return f"{titles}: all have these modules in these sizes; the base model decides"
    if description.family is None:
        if claimed:
            return f"{claimed}, as its metadata says; its modules are not those of that family"
        return "unknown: neither names nor metadata tell"
    sizes = {find_title(size) for size in description.sizes}
    name = sizes.pop() if len(sizes) == 1 else find_title(description.family)
    version = description.version_claimed
    if version and description.family_claimed == description.family and version not in name:
        return f"{name}, by its module names and shapes; {version} by its metadata"
    if claimed and description.family_claimed not in (
        description.family,
        _parent_family(description.family),
    ):
        return f"{name}, by its module names and shapes; its metadata says {claimed}"
    return name


def _parent_family(family: str) -> str:
    """What the metadata of a pruned family's LoRAs says: the family it was pruned from."""
    return {"ssd-1b": "sdxl", "segmind-vega": "sdxl", "bk-sdm": "sd15"}.get(family, family)


def _support_text(description: Description) -> str:
    if description.kind == "base":
        return (
            "can use it as --source and --target"
            if description.supported
            else f"no: {description.reason}"
        )
    if not description.supported:
        reason = (description.reason or "").removeprefix(f"{description.path}: ")
        return f"cannot transfer it: {reason}"
    on_base = "; its updates depend on the base it was trained on (--source)"
    on_base = on_base if description.needs_base else ""
    if not description.families:
        return (
            "can move it between two base models that both have its layers, and tells which have "
            f"(`prolora check`): these are of no model family that it knows{on_base}"
        )
    if on_base:
        return f"can transfer it{on_base}"
    return "can transfer it, and convert it to any format that has its modules (`prolora convert`)"


def _vector_facts(description: Description) -> Iterator[tuple[str, str]]:
    words = {
        "bias": ("trained bias", "trained biases"),
        "norm": ("weight of a normalisation layer", "weights of normalisation layers"),
    }
    counts = [_count_text(number, *words[kind]) for kind, number in description.vectors.items()]
    if counts:
        yield "also", " and ".join(counts)
