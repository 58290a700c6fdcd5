"""The data of every family: consistent in itself, and what ComfyUI has."""

import re
import tracemalloc

import pytest
from family_files import collect_weights
from family_oracles import read_comfyui_names

from prolora.architectures.families import known_families
from prolora.architectures.family import Family, Fused, list_parts
from prolora.architectures.identify import identify_base
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import BARE

FAMILIES = known_families()
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def modules_of(family: Family) -> list[str]:
    return list(dict.fromkeys(name for id_ in family.layouts for name in load_layout(id_).shapes))


@EACH
def test_every_layout_of_a_family_loads_and_belongs_to_no_other(family: Family) -> None:
    assert family.layouts and family.title
    for id_ in family.layouts:
        assert identify_base(load_layout(id_).shapes).sizes == (id_,)
        assert [other.id for other in FAMILIES.values() if id_ in other.layouts] == [family.id]


@EACH
def test_the_table_holds_modules_of_the_layouts_and_none_twice(family: Family) -> None:
    parts = [part for entry in family.authors.values() for part in list_parts(entry)]
    first = [re.sub(r"\.N\b", ".0", part) for part in parts]
    assert {family.find_pattern(part) for part in first} <= family.shapes.keys()
    assert family.find_pattern(f"{first[0] if first else ''}.foreign") is None
    assert len(parts) == len(set(parts))
    # A name of the authors that is also one of diffusers' must mean the same module.
    for name, entry in family.authors.items():
        assert name not in family.shapes or list_parts(entry) == (name,)
    for name, entry in family.aliases.items():
        assert name not in family.authors
        if isinstance(entry, str) and entry not in family.authors:  # a part of a fused matrix
            fused, _, number = entry.rpartition(".")
            assert int(number) < len(list_parts(family.authors[fused]))
            continue
        held = family.authors[entry] if isinstance(entry, str) else entry
        assert set(list_parts(held)) <= set(family.shapes)


@EACH
def test_shares_fit_the_shapes_of_every_size(family: Family) -> None:
    """The rows of the parts are in the ratio of their shares, and all read the same features."""
    for entry in (*family.authors.values(), *family.aliases.values()):
        if not isinstance(entry, Fused):
            continue
        assert len(entry.parts) == len(entry.shares) > 1
        for id_ in family.layouts:
            shapes = load_layout(id_).shapes
            blocks = [part.replace(".N.", ".0.") for part in entry.parts]
            sizes = [shapes.get(name) for name in blocks]
            if None in sizes:  # not in every size, and then no part of it
                assert not any(sizes)
                continue
            units = {size[0] / share for size, share in zip(sizes, entry.shares, strict=True)}
            assert len(units) == 1 and len({size[1:] for size in sizes}) == 1


def test_no_two_families_have_one_claim() -> None:
    """Of two that metadata begins with (hunyuan-video, hunyuan-video-1.5) the longer one tells."""
    claims = [claim for family in FAMILIES.values() for claim in family.claims]
    assert len(claims) == len(set(claims))
    assert all(claim == claim.lower() for claim in claims)


@pytest.mark.parametrize("layout", read_comfyui_names())
def test_comfyui_has_the_same_matrices_and_cuts_them_at_the_same_rows(layout: str) -> None:
    """All of its model's matrices, and the rows that its key map gives to diffusers' names."""
    family = next(family for family in FAMILIES.values() if layout in family.layouts)
    theirs = read_comfyui_names()[layout]
    shapes = load_layout(layout).shapes
    ours, parts, parameters = {}, {}, set()
    for name, weight in collect_weights(family, shapes).items():
        if BARE.search(weight.parts[0]):
            parameters.add(name)  # some are flat in ComfyUI
            continue
        start = 0
        for part in weight.parts:
            parts[part] = [name, start, shapes[part][0]]
            start += shapes[part][0]
        ours[name] = [start, *shapes[weight.parts[0]][1:]]
    assert ours == {name: theirs["matrices"].get(name) for name in ours}
    # Positions, and the text of nothing: tables that diffusers does not train.
    tables = {"pos_embed", "y_embedder.y_embedding"}
    assert set(theirs["matrices"]) - set(ours) <= parameters | tables
    mapped = {module: cut for module, cut in theirs["parts"].items() if module in parts}
    assert mapped == {module: parts[module] for module in mapped}


def test_a_made_up_name_of_a_thousand_numbers_takes_neither_time_nor_memory() -> None:
    name = ".".join(["blocks", *["1"] * 1000, "attn"])
    for family in FAMILIES.values():
        family.find_module("blocks.1.attn")  # reads the tables
    tracemalloc.start()
    assert not any(family.find_module(name) for family in FAMILIES.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # choices of two numbers are 500,000 names of 2 kB
