"""The data of every family: consistent in itself, and what diffusers' own converters read."""

import re
import tracemalloc

import pytest
import torch
from diagonal import mark_size
from family_oracles import (
    COLUMNS,
    ORACLES,
    Checkpoint,
    list_held,
    list_weights,
    make_rows,
    read_comfyui_names,
    store_as_authors,
)
from published_models import PUBLISHED

from prolora.architectures.families import known_families
from prolora.architectures.family import Family, Fused, list_parts
from prolora.architectures.identify import identify_base
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import BARE

_BLOCK = re.compile(r"\.\d+\.")
FAMILIES = known_families()
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def each_size(kind: str) -> pytest.MarkDecorator:
    """Every published size of the families of which diffusers reads this kind of file."""
    return pytest.mark.parametrize(
        "family, layout",
        [
            pytest.param(family, layout, id=layout, marks=mark_size(layout))
            for id_, family in FAMILIES.items()
            if id_ in ORACLES and getattr(ORACLES[id_], kind)
            for layout in family.layouts
            if layout in PUBLISHED
        ],
    )


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


@each_size("checkpoint")
def test_the_authors_checkpoint_is_what_diffusers_reads(family: Family, layout: str) -> None:
    """All weights and biases, bit by bit: the rows of fused matrices, the order of halves."""
    convert = find_converter("single_file_utils", family, "checkpoint")
    model = make_model(family, layout)
    weights = list_weights(model)
    shapes = {module: shape for module, (_, shape) in weights.items()}
    rows = make_rows(shapes)
    stored, expected = Checkpoint(), {}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    for name, weight in list_held(family, shapes).items():
        matrix = store_as_authors(weight, rows, shapes)
        first = weight.parts[0]
        stored[name + weights[first][0]] = matrix
        expected |= {part + weights[part][0]: rows[part] for part in weight.parts}
        if f"{first}.bias" in biases:
            stored[f"{name}.bias"] = matrix[:, 0]
            expected |= {f"{part}.bias": rows[part][:, 0] for part in weight.parts}
    converted = convert(checkpoint=stored, config=dict(model.config))
    assert set(expected) <= set(converted)
    wrong = [key for key, rows in expected.items() if not torch.equal(converted[key], rows)]
    assert not wrong


@each_size("lora")
def test_a_lora_in_the_authors_names_is_what_diffusers_reads(family: Family, layout: str) -> None:
    """Both factors of every module, bit by bit."""
    convert = find_converter("lora_conversion_utils", family, "lora")
    left_out = ORACLES[family.id].not_in_lora
    held = list_lora_weights(family, layout, lambda weight: weight.name not in left_out)
    stored, expected = {}, {}
    for name, (down, up, parts) in held.items():
        stored[f"diffusion_model.{name}.lora_A.weight"] = down
        stored[f"diffusion_model.{name}.lora_B.weight"] = up
        expected |= parts
    assert_equal(convert(dict(stored)), expected)


@each_size("kohya")
def test_a_lora_in_kohyas_spelling_is_what_diffusers_reads(family: Family, layout: str) -> None:
    """The blocks, with the alpha that kohya's files have."""
    convert = find_converter("lora_conversion_utils", family, "kohya")
    held = list_lora_weights(family, layout, lambda weight: bool(_BLOCK.search(weight.name)))
    stored, expected = {}, {}
    for name, (down, up, parts) in held.items():
        path = "lora_unet_" + name.replace(".", "_")
        stored[f"{path}.lora_down.weight"] = down
        stored[f"{path}.lora_up.weight"] = up
        stored[f"{path}.alpha"] = torch.tensor(float(len(down)))
        expected |= parts
    assert_equal(convert(dict(stored)), expected)


def list_lora_weights(family, layout, keep):
    """The authors' name -> down, up, and what diffusers calls and makes of both."""
    weights = list_weights(make_model(family, layout))
    shapes = {module: shape for module, (suffix, shape) in weights.items() if suffix}
    rows = make_rows(shapes)
    held = {}
    for number, (name, weight) in enumerate(list_held(family, shapes).items()):
        if keep(weight):
            down = torch.full((COLUMNS, 3), float(number))
            parts = {f"transformer.{part}.lora_A.weight": down for part in weight.parts}
            parts |= {f"transformer.{part}.lora_B.weight": rows[part] for part in weight.parts}
            held[name] = down, store_as_authors(weight, rows, shapes), parts
    assert held
    return held


def assert_equal(got, expected):
    assert set(got) == set(expected)
    assert not [key for key, rows in expected.items() if not torch.equal(got[key], rows)]


def find_converter(module, family, kind):
    """The function of diffusers that reads this kind of file of a family."""
    utils = pytest.importorskip(f"diffusers.loaders.{module}")
    name = getattr(ORACLES[family.id], kind)
    if not hasattr(utils, name):
        pytest.skip(f"this diffusers has no {name}")
    return getattr(utils, name)


def make_model(family, layout):
    """The class of a published size, without weights and with few blocks."""
    from make_layouts import build_model

    return build_model(PUBLISHED[layout], **ORACLES[family.id].changes)


@pytest.mark.parametrize("layout", read_comfyui_names())
def test_comfyui_has_the_same_matrices_and_cuts_them_at_the_same_rows(layout: str) -> None:
    """All of its model's matrices, and the rows that its key map gives to diffusers' names."""
    family = next(family for family in FAMILIES.values() if layout in family.layouts)
    theirs = read_comfyui_names()[layout]
    shapes = load_layout(layout).shapes
    ours, parts, parameters = {}, {}, set()
    for name, weight in list_held(family, shapes).items():
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
