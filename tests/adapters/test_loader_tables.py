"""What a family says that a program reads, the program has read: a module for every path.

`support/loader_keys.json.gz` was made by running the programs' own loaders, outside this
repository, on files of every family: {program: {family: {format and whose names: {factors,
paths}}}}. A format stands there only if the program left nothing of the file's attention and
feed-forward modules over, at scale 1. In a path, N is any number.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest

from prolora.architectures.families import known_families
from prolora.architectures.family import Family
from prolora.architectures.layouts import load_layout
from prolora.architectures.ldm import diffusers_to_ldm

TABLE = Path(__file__).parents[1] / "support" / "loader_keys.json.gz"
FACTORS = {"kohya": "lora_up, lora_down, alpha"}
PLAIN_FACTORS = "lora_A, lora_B"
# Of stacks whose names do not tell attention and feed-forward from the rest: what is neither.
NEITHER = re.compile(
    r"adaLN_modulation|(?:img|txt)_mod\.|norm\d?\.linear|distilled_guidance_layer|\.gate$"
)
# What a program's models of a family do not have.
ABSENT = {
    # InvokeAI has Wan 2.2 only, where images come in with the latents.
    ("InvokeAI", "wan"): re.compile(r"\.attn2\.add_[kv]_proj$"),
    # InvokeAI and sd-scripts have Anima only, which has no cross-attention to an image.
    ("InvokeAI", "cosmos"): re.compile(r"\.attn2\.(?:[qkv]_img|img_context)"),
    ("sd-scripts", "cosmos"): re.compile(r"\.attn2\.(?:[qkv]_img|img_context)"),
}


@cache
def read_table() -> dict[str, dict[str, dict[str, dict[str, list[str]]]]]:
    return json.loads(gzip.decompress(TABLE.read_bytes()))


@cache
def compile_paths(program: str, family: str, key: str) -> re.Pattern[str]:
    paths = read_table()[program][family][key]["paths"]
    numbers = (re.sub(r"(?<![0-9A-Za-z])N(?![0-9A-Za-z])", r"\\d+", re.escape(p)) for p in paths)
    return re.compile("|".join(numbers))


def list_cases() -> list[tuple[str, str, str]]:
    """(family, program, format) of all readers."""
    return [
        (family.id, program, format)
        for family in known_families().values()
        for program, formats in family.readers.items()
        for format in formats
    ]


def list_modules(family: Family, program: str) -> set[str]:
    """Attention and feed-forward of all published sizes, as far as the program has them."""
    absent = ABSENT.get((program, family.id))
    layouts = map(load_layout, family.layouts)
    modules = {name for layout in layouts for name in layout.adapted if name not in layout.outside}
    return {
        name
        for name in modules
        if not NEITHER.search(name) and not (absent and absent.search(name))
    }


def spell_path(family: Family, format: str, module: str) -> str:
    """What a file of the format calls the module, or the matrix that holds it."""
    prefix, names, dotted = family.spellings[format]
    name = module if names == "diffusers" else name_as_authors(family, module)
    return prefix + (name if dotted else name.replace(".", "_"))


def name_as_authors(family: Family, module: str) -> str:
    if family.unet:
        name = diffusers_to_ldm(module, layers_per_block=1 if family.id == "koala" else 2)
        assert name is not None, module
        return name
    weight = family.find_weight_holding(module)
    assert weight is not None, module
    return weight.name


@pytest.mark.parametrize(("id_", "program", "format"), list_cases())
def test_a_program_has_a_module_for_every_path_of_a_format_it_is_said_to_read(
    id_: str, program: str, format: str
) -> None:
    family = known_families()[id_]
    key = f"{format}/{family.spellings[format].names}"
    assert key in read_table()[program].get(id_, {}), "was not measured, or not read whole"
    known = compile_paths(program, id_, key)
    modules = list_modules(family, program)
    assert modules
    paths = {spell_path(family, format, module) for module in modules}
    assert not [path for path in sorted(paths) if not known.fullmatch(path)]


@pytest.mark.parametrize(("id_", "program", "format"), list_cases())
def test_a_program_reads_the_factors_as_the_format_calls_them(
    id_: str, program: str, format: str
) -> None:
    key = f"{format}/{known_families()[id_].spellings[format].names}"
    assert FACTORS.get(format, PLAIN_FACTORS) in read_table()[program][id_][key]["factors"]


def test_readers_are_programs_and_formats_that_exist() -> None:
    for family in known_families().values():
        for program, formats in family.readers.items():
            assert program in read_table(), (family.id, program)
            assert set(formats) <= set(family.spellings), (family.id, program)
            assert len(set(formats)) == len(formats) > 0
