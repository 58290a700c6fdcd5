"""What a family says that a program reads, the program has read: a module for every path.

`support/loader_keys.json.gz` was made by running the programs' own loaders, outside this
repository, on files of every family: {program: {family: {prefix|whose names: {factors, paths}}}}.
A spelling stands there only if the program left nothing of the file's attention and feed-forward
modules over, at scale 1. In a path, N is any number.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from prolora.adapters import Adapter, encode_state_dict
from prolora.architectures.families import known_families
from prolora.architectures.family import Family, Spelling
from prolora.architectures.layouts import load_layout
from prolora.architectures.ldm import diffusers_to_ldm
from prolora.core.lowrank import LowRank

TESTS = Path(__file__).parents[1]
TABLE = TESTS / "support" / "loader_keys.json.gz"
PAGE = TESTS.parent / "docs" / "formats.md"
# Compared by its results with our own, not by the paths it has modules for.
BY_RESULTS = {"A1111"}
FACTORS = {"kohya": "lora_up, lora_down, alpha"}
PLAIN_FACTORS = "lora_A, lora_B"
SUFFIX = re.compile(r"\.(?:lora_[AB]|lora_up|lora_down)\.weight$|\.alpha$")
# Of stacks whose names do not tell attention and feed-forward from the rest: what is neither, or,
# as a convolution of single channels and a choice of experts, takes no LoRA in diffusers.
NEITHER = re.compile(
    r"adaLN_modulation|(?:img|txt)_mod\.|norm\d?\.linear|distilled_guidance_layer|\.gate$|conv_depth$"
)
# What a program's models of a family do not have.
ABSENT = {
    # InvokeAI has Wan 2.2 only, where images come in with the latents, and no VACE; nor has musubi.
    ("InvokeAI", "wan"): re.compile(r"\.attn2\.add_[kv]_proj$|^vace_blocks"),
    ("musubi", "wan"): re.compile(r"^vace_blocks"),
    # VACE's own blocks: diffusers reads them in its own names only.
    ("diffusers", "wan"): re.compile(r"^vace_blocks"),
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


def find_key(family: Family, program: str, spelling: Spelling) -> str:
    """The key of the table for files in the spelling."""
    prefix, names, _ = spelling
    keys = [f"{prefix}|{names}"] + [f"{prefix}|diffusers"] * (not family.authors)
    measured = read_table()[program].get(family.id, {})
    assert measured.keys() & set(keys), "was not measured, or not read whole"
    return next(key for key in keys if key in measured)


def list_cases() -> list[tuple[str, str, str]]:
    """(family, program, format) of all readers."""
    return [
        (family.id, program, format)
        for family in known_families().values()
        for program, formats in family.readers.items()
        if program not in BY_RESULTS
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


def spell_path(family: Family, spelling: Spelling, module: str) -> str:
    """What a file in the spelling calls the module, or the matrix that holds it."""
    prefix, names, dotted = spelling
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
    known = compile_paths(program, id_, find_key(family, program, family.spellings[format]))
    modules = list_modules(family, program)
    assert modules
    paths = {spell_path(family, family.spellings[format], module) for module in modules}
    assert not [path for path in sorted(paths) if not known.fullmatch(path)]


@pytest.mark.parametrize(("id_", "program", "format"), list_cases())
def test_a_program_reads_the_factors_as_the_format_calls_them(
    id_: str, program: str, format: str
) -> None:
    family = known_families()[id_]
    key = find_key(family, program, family.spellings[format])
    assert FACTORS.get(format, PLAIN_FACTORS) in read_table()[program][id_][key]["factors"]


@pytest.mark.parametrize(
    ("id_", "spelling"),
    [(f.id, spelling) for f in known_families().values() for spelling in f.also_read],
)
def test_a_further_spelling_is_read_by_the_programs_it_names(id_: str, spelling: Spelling) -> None:
    family = known_families()[id_]
    for program in family.also_read[spelling]:
        key = find_key(family, program, spelling)
        factors = PLAIN_FACTORS if spelling.dotted else FACTORS["kohya"]
        assert factors in read_table()[program][id_][key]["factors"]
        known = compile_paths(program, id_, key)
        paths = {spell_path(family, spelling, name) for name in list_modules(family, program)}
        assert not [path for path in sorted(paths) if not known.fullmatch(path)]


@cache
def write_keys(id_: str, format: str) -> frozenset[str]:
    """Keys of a LoRA of rank 1 on the first block of every stack of every size, as we write it."""
    family, keys = known_families()[id_], set()
    modules = list_modules(family, "")
    for layout in map(load_layout, family.layouts):
        first = {
            name: LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))
            for name, shape in layout.shapes.items()
            if name in modules and len(shape) == 2 and is_first(name)
        }
        keys |= encode_state_dict(Adapter(first, family=id_), format=format).keys()
    return frozenset(keys)


def is_first(name: str) -> bool:
    return all(number in "012" for number in re.findall(r"(?<=\.)\d+(?=\.)", name))


@pytest.mark.parametrize(("id_", "program", "format"), list_cases())
def test_a_program_has_a_module_for_every_key_of_a_file_that_we_write(
    id_: str, program: str, format: str
) -> None:
    family = known_families()[id_]
    known = compile_paths(program, id_, find_key(family, program, family.spellings[format]))
    absent = ABSENT.get((program, id_))
    ours = {SUFFIX.sub("", key) for key in write_keys(id_, format)}
    assert ours
    missing = sorted(path for path in ours if not known.fullmatch(path))
    if absent is not None:
        allowed = {
            spell_path(family, family.spellings[format], name)
            for name in list_modules(family, "")
            if absent.search(name)
        }
        missing = [path for path in missing if path not in allowed]
    assert not missing


def test_readers_are_programs_and_formats_that_exist() -> None:
    for family in known_families().values():
        for program, formats in family.readers.items():
            assert program in read_table().keys() | BY_RESULTS, (family.id, program)
            assert set(formats) <= set(family.spellings), (family.id, program)
            assert len(set(formats)) == len(formats) > 0


def read_page() -> dict[tuple[str, str], str]:
    """(family's title, program) -> cell of the page's table."""
    section = PAGE.read_text().partition("## Which programs read")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    programs = lines[0][1:]
    return {
        (row[0], p): cell for row in lines[2:] for p, cell in zip(programs, row[1:], strict=True)
    }


def test_the_page_of_formats_says_what_the_families_say() -> None:
    page, table = read_page(), read_table()
    programs = {program for _, program in page}
    assert {title for title, _ in page} == {family.title for family in known_families().values()}
    for family in known_families().values():
        assert set(family.readers) <= programs
        for program in programs:
            cell = page[family.title, program]
            if program in family.readers:
                assert cell == ", ".join(family.readers[program]), (family.id, program)
            elif family.id in table.get(program, {}):
                assert cell == "none whole", (family.id, program)
            else:
                assert cell in {"not tried", "no model", "no loader"}, (family.id, program)
