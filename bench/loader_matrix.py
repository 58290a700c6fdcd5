"""Which keys of a LoRA a program reads, by the program's own code: the counts of docs/formats.md.

    python bench/loader_matrix.py PROGRAM CHECKOUT [--version V] [--families flux wan] [--json FILE]
    python bench/loader_matrix.py PROGRAM CHECKOUT --alpha
    python bench/loader_matrix.py PROGRAM CHECKOUT --further [--families flux wan]
    python bench/loader_matrix.py PROGRAM CHECKOUT --files FOLDER
    python bench/loader_matrix.py table

The first adds its counts to bench/results/loaders.json (or FILE), the second what becomes of
kohya's files without alphas, and of others with them. The third adds counts for the names that
trainers write and prolora does not, for example `double_blocks.0.img_mlp.fc1`. The fourth adds
which kinds of updates the program reads in the files of docs/make_conformance.py, and prints the
files that `prolora check --for` counts otherwise. The last makes
python/prolora/architectures/loaders.json from the counts: what prolora knows of programs.

CHECKOUT is a folder with the program's source; nothing of it is kept. A LoRA over the linear layers
of a family, in every spelling that files have, goes through what the program does before it touches
a weight. Of blocks, it has the first two and the last of every stack. A module counts as read if
the program took every key of it for a matrix of that shape; of diffusers, with its rows in order. A
program whose packages are missing here gets empty ones in their place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loader_programs import PROGRAMS, Keys, Open, Read
from loader_programs.common import number_rows
from safetensors.torch import load_file
from torch import Tensor

from prolora.adapters import Adapter
from prolora.adapters.contents import parse_contents
from prolora.adapters.formats.encoding import encode_adapter
from prolora.adapters.formats.groups import lay_out
from prolora.adapters.formats.programs import NAMED
from prolora.adapters.key_groups import Slot
from prolora.adapters.keys.tensor_keys import find_adapter_name, split_key
from prolora.adapters.lora import Lora
from prolora.architectures import loaders
from prolora.architectures.families import known_families, loaded_families
from prolora.architectures.family import (
    NUMBER,
    Family,
    Fused,
    Spelling,
    Variant,
    list_trials,
)
from prolora.architectures.identify import Model, share_rows
from prolora.architectures.layouts import UNUSED, load_layout
from prolora.architectures.modules import (
    TEXT_ENCODERS,
    find_block,
    is_in_text_encoder,
    is_linear,
)
from prolora.checking.check import check
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat

Keep = Callable[[str], bool]
"""Which modules a file has."""
RESULTS = Path(__file__).parent / "results/loaders.json"
TABLE = Path(loaders.__file__).with_suffix(".json")
WHOLE: set[str] = set()
"""Families of which LoRAs have all blocks, since the program counts them."""
TOLD: list[str] = []
"""Errors of programs that were printed: the same comes for every pattern that is tried."""
SPELLINGS = (
    Spelling("diffusion_model.", "authors"),
    Spelling("diffusion_model.", "diffusers"),
    Spelling("lora_unet_", "authors", dotted=False),
    Spelling("lora_unet_", "diffusers", dotted=False),
    Spelling("transformer.", "diffusers"),
    Spelling("transformer.", "authors"),
    Spelling("base_model.model.", "diffusers"),
    Spelling("", "diffusers"),
    Spelling("", "authors"),
    Spelling("lora_transformer_", "diffusers", dotted=False),
    Spelling("lycoris_", "diffusers", dotted=False),
)
PREFIXES = (
    "diffusion_model.",
    "model.diffusion_model.",
    "diffusion_model.model.",
    "diffusion_model.decoder.",
    "transformer.",
    "transformer.base_model.model.",
    "base_model.model.",
    "base_model.model.diffusion_model.",
    "unet.base_model.model.",
    "unet.",
    "net.",
    "model.",
    "pipe.dit.",
    "diffusion_model.core.",
    "transformer.core.",
    "",
    "lora_unet_",
    "lora_unet__",
    "lora_unet_unet_",
    "lora_unet_model_",
    "lora_unet_decoder_",
    "lora_unet.",
    "lora_transformer_",
    "lora_transformer.",
    "lycoris_",
    "lycoris.",
)
"""What files of trainers have before the names of a transformer's modules."""
VARIANTS: tuple[Variant, ...] = ("diffusers", "authors", "alias", "part", "fused")
FURTHER = {
    f"{prefix}|{variant}": (prefix, variant)
    for prefix in PREFIXES
    for variant in VARIANTS
    if variant not in ("diffusers", "authors")
    or Spelling(prefix, variant, prefix[-1:] != "_") not in SPELLINGS
}
"""Row -> (prefix, variant) of the files that no format of prolora's writes."""
EVERYONES = [f"{one.prefix}|{one.names}" for one in SPELLINGS]
"""Rows that every program is tried with."""
MOST_PAIRED = 16
"""Patterns that are tried in pairs, where a program stops at each alone."""
MOST_LISTED = 64
"""Patterns of modules that the table lists; of a program that leaves more it says "in part"."""
NOT_TRIED = ("fps_projection.",)
"""What SkyReels-V2 has beside Wan's blocks, which LoRAs leave alone."""
PROGRAM_ERRORS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
_CLIP_L, _CLIP_G, _CLIP_H = (768, 3072), (1280, 5120), (1024, 4096)
_LAYER = "text_model.encoder.layers.0"
TEXT_MODULES = {
    name: {
        f"{_LAYER}.self_attn.q_proj": (m, m),
        f"{_LAYER}.self_attn.out_proj": (m, m),  # by which diffusers tells kohya's files
        f"{_LAYER}.mlp.fc1": (n, m),
        "text_projection": (m, m),
    }
    for name, (m, n) in (("clip-l", _CLIP_L), ("clip-bigg", _CLIP_G), ("clip-h", _CLIP_H))
} | {
    "t5-xxl": {
        "encoder.block.0.layer.0.SelfAttention.q": (4096, 4096),
        "encoder.block.0.layer.1.DenseReluDense.wi_0": (10240, 4096),
    },
    "qwen3-0.6b": {
        "layers.0.self_attn.q_proj": (2048, 1024),
        "layers.0.self_attn.o_proj": (1024, 2048),
        "layers.0.mlp.gate_proj": (3072, 1024),
    },
}
"""Text encoder -> some modules of it, with their shapes."""
UNET_FORMATS = ("comfy", "kohya", "diffusers", "peft")


def linear_shapes(layout: str) -> dict[str, tuple[int, ...]]:
    """The matrices of a published size, and a UNet's convolutions."""
    shapes = load_layout(layout).shapes
    axes = (2, 4) if any(name.startswith("down_blocks.") for name in shapes) else (2,)
    return {name: shape for name, shape in shapes.items() if len(shape) in axes}


def select_blocks(names: list[str]) -> list[str]:
    """The modules in the first two blocks and the last of every stack."""
    blocks = {name: block for name in names if (block := find_block(name))}
    last: dict[str, int] = {}
    for block in blocks.values():
        last[block.stack] = max(last.get(block.stack, 0), int(block.number))
    return [n for n, b in blocks.items() if int(b.number) < 2 or int(b.number) == last[b.stack]]


def list_layouts(family: Family) -> list[str]:
    """The published sizes that have modules, or a loader, which those before them have not."""
    chosen, seen = [], set()
    apart = {sizes[0] for sizes in family.groups.values()}
    for layout in family.layouts:
        patterns = {family.find_pattern(name) for name in linear_shapes(layout)}
        if layout in apart or not patterns <= seen:
            chosen.append(layout)
            seen |= patterns
    return chosen


@cache
def list_linear(id_: str, layout: str) -> dict[str, tuple[int, ...]]:
    """The linear layers outside blocks and in the first two and the last block of every stack."""
    family, shapes = loaded_families()[id_], linear_shapes(layout)
    shapes = {
        name: shape
        for name, shape in shapes.items()
        if (is_linear(name, shape) or len(shape) == 4)
        and not name.startswith((*UNUSED, *NOT_TRIED))
    }
    if family.unet or id_ in WHOLE:
        return shapes
    chosen = {*select_blocks(list(shapes)), *(name for name in shapes if not find_block(name))}
    return {name: shape for name, shape in shapes.items() if name in chosen}


def make_adapter(family: Family, layout: str, keep: Keep) -> Adapter:
    """A LoRA of rank 1."""
    shapes = {n: s for n, s in list_linear(family.id, layout).items() if keep(n)}
    updates = {
        name: LowRank(number_rows(m), torch.ones(1, torch.Size(inputs).numel()))
        for name, (m, *inputs) in shapes.items()
    }
    kernels = {name: shape[2:] for name, shape in shapes.items() if len(shape) > 2}
    return Adapter(updates, kernels, origin=Model.of(family.id))


def make_text_adapter(family: Family, layout: str) -> Adapter:
    """A LoRA on the usual modules, and on some of each text encoder that LoRAs are read for."""
    usual = set(load_layout(layout).adapted)
    adapter = make_adapter(family, layout, usual.__contains__)
    for component, encoder in zip(TEXT_ENCODERS, load_layout(layout).text_encoders, strict=False):
        for name, (m, n) in TEXT_MODULES.get(encoder, {}).items():
            update = LowRank(torch.ones(m, 1), torch.ones(1, n))
            adapter.updates[f"{component}.{name}"] = update
    return adapter


def measure_text(
    family: Family, layout: str, read: Read, row: tuple[str, str, Spelling | None]
) -> dict[str, bool]:
    """Text encoder -> whether a program reads it, in a file with the usual modules too."""
    adapter = make_text_adapter(family, layout)
    found: dict[str, bool] = {}
    try:
        tensors, keys = encode_row(adapter, family, row)
        taken = read(dict(tensors), keys) & tensors.keys()
    except UnsupportedFormat:
        return {}  # a PEFT folder has one model
    except PROGRAM_ERRORS:
        tensors, taken = {}, set()
        plain = make_adapter(family, layout, set(load_layout(layout).adapted).__contains__)
        with suppress(*PROGRAM_ERRORS):  # without encoders
            read(*encode_row(plain, family, row))
            found[loaders.STOPS] = False
    for name in filter(is_in_text_encoder, adapter.updates):
        component = loaders.name_encoder(name)
        whole = bool(tensors) and set(keys[name]) <= taken
        found[component] = found.get(component, True) and whole
    return found


def add_text(open_program: Open, tables: dict[str, Any], families: Collection[str]) -> None:
    """Counts anew what a program reads of text encoders."""
    for id_ in families or tables:
        family = known_families()[id_]
        for layout, rows in tables[id_].items():
            if layout and (read := open_program(family, layout)):
                for row in list_rows(family):
                    if text := measure_text(family, layout, read, row):
                        rows[row[0]]["text"] = text
        print(id_, flush=True)


def list_rows(family: Family) -> list[tuple[str, str, Spelling | None]]:
    """(row of the table, format, spelling) of the files of a family."""
    if family.unet:
        rows = [(format, format, None) for format in UNET_FORMATS]
        others = list_others(family)
        return rows + [
            (row, row.partition(",")[0], None) for row in others if row not in UNET_FORMATS
        ]
    rows: list[tuple[str, str, Spelling | None]] = []
    for spelling in dict.fromkeys((*SPELLINGS, *family.spellings.values())):
        if spelling.names == "authors" and not family.authors:
            continue
        format = "diffusers" if spelling.dotted else "kohya"
        format = "comfy" if spelling.prefix == "diffusion_model." else format
        rows.append((loaders.name_row(family, format, spelling), format, spelling))
        if spelling.dotted:
            row = loaders.name_row(family, format, spelling, other=DOWN)
            rows.append((row, format, spelling))
    return rows


ENDS = {"lora.down": ("lora.down", "lora.up"), "lora_down": ("lora_down", "lora_up")}
OTHERS = [
    ("kohya", loaders.OtherKeys("diffusers")),
    ("kohya", loaders.OtherKeys("authors")),
    ("kohya", loaders.OtherKeys("diffusers", "lycoris_")),
    ("kohya", loaders.OtherKeys("authors", "lycoris_")),
    ("kohya", loaders.OtherKeys(ends="lora.down")),
    ("kohya", loaders.OtherKeys("diffusers", ends="lora.down")),
    ("diffusers", loaders.OtherKeys("diffusers", "")),
    ("diffusers", loaders.OtherKeys("authors", "")),
    ("diffusers", loaders.OtherKeys(ends="lora.down")),
    ("diffusers", loaders.OtherKeys(ends="_lora.down")),
    ("diffusers", loaders.OtherKeys(ends="lora_down")),
    ("comfy", loaders.OtherKeys(ends="lora_down")),
]
"""Format and keys of the files of UNets that no format of prolora's writes."""
DOWN = loaders.OtherKeys(ends="lora_down")
"""What is unusual in other models' files, where prefixes have dots."""


def list_others(family: Family) -> dict[str, loaders.OtherKeys]:
    """Row -> keys that no format of prolora's writes."""
    if family.unet:
        return {
            loaders.name_row(family, format, None, other=other): other
            for format, other in OTHERS
            if format in family.spellings
        }
    spellings = dict.fromkeys((*SPELLINGS, *family.spellings.values()))
    return {loaders.name_row(family, "", one, other=DOWN): DOWN for one in spellings if one.dotted}


def respell(other: loaders.OtherKeys, adapter: Adapter, format: str, keys: Keys) -> Keys:
    """The keys of each module of the denoiser; `keys` has the usual ones."""
    named = encode(adapter, "comfy", None)[1] if other.names == "authors" else keys
    return {
        name: [respell_key(other, name, named[name][0], format, key) for key in of]
        for name, of in keys.items()
        if not is_in_text_encoder(name) or other == DOWN
    }


def respell_key(other: loaders.OtherKeys, name: str, path: str, format: str, key: str) -> str:
    """The key in place of `key`; `path` is a key of the module that has the wanted names."""
    own, _, end = key.removesuffix(".weight").rpartition(".")
    if other.names:
        own = name
        if other.names == "authors":
            own = path.removesuffix(".weight").rpartition(".")[0].removeprefix("diffusion_model.")
        own = own.replace(".", "_") if format == "kohya" else own
        own = ("lora_unet_" if other.prefix is None else other.prefix) + own
    if other.ends == "_lora.down":
        own, number = re.subn(r"\.(to_(?:q|k|v|out))(?:\.0)?$", r".processor.\1", own)
        return f"{own}{'_' if number else '.'}lora.{'up' if end == 'lora_B' else 'down'}.weight"
    if other.ends and end != "alpha":
        joint = "_" if format == "kohya" and other.ends == "lora.down" else "."
        return f"{own}{joint}{ENDS[other.ends]['up' in end or end == 'lora_B']}.weight"
    return f"{own}.{end}" if end == "alpha" else f"{own}.{end}.weight"


def encode(
    adapter: Adapter, format: str, spelling: Spelling | None, swapped: bool = False
) -> tuple[dict[str, Tensor], Keys]:
    """The tensors of a file, and which of them each module has; fused ones share theirs.

    `swapped` leaves out alphas in a format that has them, and adds them in others.
    """
    model = adapter.model._replace(spelling=spelling)
    adapter = replace(adapter, origin=model, format=format)
    tensors = encode_adapter(adapter, format, torch.float32)
    if swapped:
        plain = {key: x for key, x in tensors.items() if not key.endswith(".alpha")}
        paths = {key.removesuffix(".weight").rpartition(".")[0] for key in plain}
        added = {f"{path}.alpha": torch.ones(()) for path in paths}
        tensors = plain if plain.keys() < tensors.keys() else plain | added
    by_path: dict[str, list[str]] = {}
    for key in tensors:
        path = key.removesuffix(".weight").rpartition(".")[0]
        by_path.setdefault(path, []).append(key)
    groups = lay_out(adapter, format).groups
    keys = {name: by_path[group.path] for group in groups for name in group.parts}
    return tensors, keys


def encode_row(
    adapter: Adapter, family: Family, row: tuple[str, str, Spelling | None], swapped: bool = False
) -> tuple[dict[str, Tensor], Keys]:
    """The tensors of a file with the keys of a row, and which of them each module has."""
    name, format, spelling = row
    tensors, keys = encode(adapter, format, spelling, swapped)
    other = list_others(family).get(name)
    if other is None:
        return tensors, keys
    named = respell(other, adapter, format, keys)
    new = {old: key for name, of in named.items() for old, key in zip(keys[name], of, strict=True)}
    return {new.get(key, key): tensor for key, tensor in tensors.items()}, keys | named


def add_others(open_program: Open, tables: dict[str, Any], families: Collection[str]) -> None:
    """Adds the counts of rows that are not there, and what alphas change in them."""
    for id_ in families or tables:
        family = known_families()[id_]
        for layout, rows in tables[id_].items():
            for row in [one for one in rows if "," in one and one not in list_others(family)]:
                del rows[row]
            read = open_program(family, layout) if layout else None
            for row in list_rows(family) if read else ():
                if row[0] in rows or not (found := measure(family, layout, read, row)):
                    continue
                found |= {"text": text} if (text := measure_text(family, layout, read, row)) else {}
                rows[row[0]] = found
                swapped = measure(family, layout, read, row, swapped=True) or {}
                if any(swapped.get(key) != found.get(key) for key in ("unread", "stops")):
                    found["alpha"] = swapped
        print(id_, flush=True)


class VariantFile(NamedTuple):
    """A file of rank 1 whose modules have the names of a variant."""

    tensors: dict[str, Tensor]
    keys: Keys  # of the modules that have such a name
    patterns: dict[str, str]  # module -> the pattern of its name in the file


def make_files(
    family: Family, layout: str, further: tuple[str, Variant], keep: Keep
) -> list[VariantFile]:
    """The files of a variant: several where a weight has several aliases.

    A module without such a name has the authors' or, beside fused ones, diffusers'. Its keys are
    not listed.
    """
    prefix, variant = further
    shapes = {n: s for n, s in list_linear(family.id, layout).items() if keep(n)}
    names: dict[str, list[tuple[str, Fused]]] = {}  # first module -> names in files
    for pattern, entry in family.list_variant(variant).items():
        names.setdefault(entry.parts[0], []).append((pattern, entry))
    others = family.list_variant("diffusers" if variant in ("diffusers", "fused") else "authors")
    plain = {entry.parts[0]: (pattern, entry) for pattern, entry in others.items()}
    files = []
    for number in range(max(map(len, names.values()), default=0)):
        file = VariantFile({}, {}, {})
        done: set[str] = set()
        for name in shapes:
            if name in done:
                continue
            pattern, numbers = find_numbers(family, name)
            some = names.get(pattern, [])
            choices = [(some[min(number, len(some) - 1)], True)] if some else []
            choices += [(plain[pattern], False)] if pattern in plain else []
            for (spelled, entry), is_variant in choices:
                parts = [fill_numbers(part, numbers) for part in entry.parts]
                if all(part in shapes and part not in done for part in parts):
                    path = fill_numbers(spelled, numbers)
                    sizes = [shapes[part] for part in parts]
                    added = add_update(file.tensors, family, prefix, path, sizes)
                    done.update(parts)
                    if is_variant:
                        file.keys.update(dict.fromkeys(parts, added))
                        file.patterns.update(dict.fromkeys(parts, spelled))
                    break
        if file.keys:
            files.append(file)
    return files


def find_numbers(family: Family, name: str) -> tuple[str, tuple[str, ...]]:
    """The pattern of a canonical module, and the numbers in it."""
    return next((one for one in list_trials(name, ".") if one[0] in family.shapes), (name, ()))


def fill_numbers(pattern: str, numbers: tuple[str, ...]) -> str:
    """A pattern with its numbers."""
    each = iter(numbers)
    return ".".join(next(each) if word == NUMBER else word for word in pattern.split("."))


def add_update(
    tensors: dict[str, Tensor],
    family: Family,
    prefix: str,
    path: str,
    shapes: list[tuple[int, int]],
) -> list[str]:
    """Adds an update with numbered rows; returns its keys."""
    rows = torch.cat([number_rows(out) for out, _ in shapes])
    weight = family.find_weight(path)
    if weight and not family.find_module(path) and weight.is_swapped((len(rows), shapes[0][1])):
        rows = rows.roll(len(rows) // 2, 0)
    dotted = prefix[-1:] != "_"
    path = prefix + (path if dotted else path.replace(".", "_"))
    kohya = not dotted or prefix.startswith(("lora_", "lycoris"))
    up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
    added = {f"{path}.{up}.weight": rows, f"{path}.{down}.weight": torch.ones(1, shapes[0][1])}
    added |= {f"{path}.alpha": torch.ones(())} if kohya else {}
    tensors |= added
    return [*added]


def measure_further(
    family: Family, layout: str, read: Read, further: tuple[str, Variant]
) -> dict[str, object] | None:
    """As `measure`, for files that no format of prolora's writes.

    For aliases, numbered parts and fused projections, "unread" lists patterns of the names in the
    file, for example `double_blocks.N.img_mlp.fc1`. "needs" lists patterns of which a file must
    have one to be read at all: ComfyUI recognises a LoRA of Wan Fun by its cross attention.
    """
    usual = set(load_layout(layout).adapted)
    own_names = further[1] in ("diffusers", "authors")
    unread, needs, reads, stops, counts = set[str](), set[str](), False, False, [0, 0, 0, 0]
    for number, whole in enumerate(make_files(family, layout, further, lambda name: True)):
        refused = False

        def run(keep: Keep, number: int = number) -> tuple[dict[str, bool], int, int]:
            nonlocal refused
            files = make_files(family, layout, further, keep)
            if not files:
                return {}, 0, 0
            tensors, keys, _ = files[min(number, len(files) - 1)]
            try:
                taken = read(dict(tensors), keys) & tensors.keys()
            except PROGRAM_ERRORS:
                taken, refused = set(), True
            modules = {name: set(of) <= taken for name, of in keys.items()}
            return modules, len(taken), len(tensors)

        modules, took, every = run(lambda name: True)
        _, *common = run(lambda name: name in usual)
        counts = [a + b for a, b in zip(counts, (took, every, *common), strict=True)]
        if refused and not any(modules.values()):
            modules = find_readable(family, run, usual, modules)
            stops = stops or any(modules.values())
        reads = reads or any(modules.values())
        patterns: dict[str, dict[str, bool]] = {}
        for name, ok in modules.items():
            pattern = str(family.find_pattern(name)) if own_names else whole.patterns[name]
            patterns.setdefault(pattern, {})[name] = ok
        unread |= {pattern for pattern, of in patterns.items() if not all(of.values())}
        read_alone = {
            pattern: all(run(set(of).__contains__)[0].values())
            for pattern, of in patterns.items()
            if all(of.values())
        }
        needs |= {x for x, ok in read_alone.items() if ok and not all(read_alone.values())}
    if not counts[1]:
        return None  # the family has no such names
    return {
        "keys": counts[:2],
        "usual": counts[2:],
        "unread": sorted(unread) if reads else ["*"],
        **({"needs": sorted(needs)} if needs else {}),
        **({"stops": True} if stops else {}),
    }


def measure(
    family: Family,
    layout: str,
    read: Read,
    row: tuple[str, str, Spelling | None],
    swapped: bool = False,
) -> dict[str, object] | None:
    """Counts of keys and the patterns of modules that are not read whole."""
    usual = set(load_layout(layout).adapted)

    def run(keep: Keep) -> tuple[dict[str, bool], int, int]:
        adapter = make_adapter(family, layout, keep)
        tensors, keys = encode_row(adapter, family, row, swapped)
        try:
            taken = read(dict(tensors), keys) & tensors.keys()
        except PROGRAM_ERRORS as error:
            told = f"  {family.id} {row[0]}: {type(error).__name__}"
            if told not in TOLD:
                TOLD.append(told)
                print(f"{told}: {error}"[:200], flush=True)
            taken = set()  # a program that stops reads nothing
        modules = {name: set(of) <= taken for name, of in keys.items()}
        return modules, len(taken), len(tensors)

    try:
        everything = run(lambda name: True)
    except UnsupportedFormat:
        return None  # the format has no names for the family
    common = run(lambda name: name in usual)
    modules, stops = everything[0], False
    # A UNet's patterns are all its modules: too many to try each.
    if not any(modules.values()) and not (family.unet and row[0] in list_others(family)):
        modules = find_readable(family, run, usual, modules)
        stops = any(modules.values())
    unread = sorted({str(family.find_pattern(name)) for name, ok in modules.items() if not ok})
    return {
        "keys": [everything[1], everything[2]],
        "usual": [common[1], common[2]],
        "unread": unread if any(modules.values()) else ["*"],
        **({"stops": True} if stops else {}),
    }


def find_readable(
    family: Family,
    run: Callable[[Keep], tuple[dict[str, bool], int, int]],
    usual: set[str],
    modules: Iterable[str],
) -> dict[str, bool]:
    """Which modules a program reads that stops at a file with others.

    Those of each pattern are tried beside what it reads of the usual ones, then in pairs.
    """
    of_pattern: dict[str | None, list[str]] = {}
    for name in modules:
        of_pattern.setdefault(family.find_pattern(name), []).append(name)
    read = run(lambda name: name in usual)[0]
    if not any(read.values()):
        for names in of_pattern.values():
            if usual.intersection(names):
                read |= run(set(names).__contains__)[0]
    base = {name for name, ok in read.items() if ok}
    for names in of_pattern.values():
        if base and not base.intersection(names):
            beside = run(lambda name, names=set(names): name in base or name in names)[0]
            read |= {name: beside.get(name, False) for name in names}
    # diffusers wants the keys and values of Wan's attention to images together.
    rest = [names for names in of_pattern.values() if not any(read.get(name) for name in names)]
    for pair in itertools.combinations(rest, 2) if base and len(rest) <= MOST_PAIRED else ():
        names = {*itertools.chain(*pair)}
        read |= {n: ok for n, ok in run((base | names).__contains__)[0].items() if ok}
    return {name: read.get(name, False) for name in modules}


def add_alphas(open_program: Open, tables: dict[str, Any], families: Sequence[str]) -> None:
    """Adds to counts that are there what alphas change, or their absence."""
    for id_, sizes in tables.items():
        if families and id_ not in families:
            continue
        family = known_families()[id_]
        for layout, rows in sizes.items():
            read = open_program(family, layout)
            for row in list_rows(family) if read else ():
                before = rows.get(row[0], {"unread": ["*"]})
                found = measure(family, layout, read, row, swapped=True)
                if any(found.get(key) != before.get(key) for key in ("unread", "stops")):
                    before["alpha"] = found
            print(f"{id_}: {layout}", flush=True)


def number_parts(tensors: dict[str, Tensor], slots: list[Slot]) -> dict[str, Tensor]:
    """Numbers the rows of every column, anew in each part of a fused weight."""
    for slot in slots:
        for key in slot.keys.values():
            if tensors[key].shape[1:].numel() == 1 and tensors[key].ndim > 1:
                size, matrix = (len(tensors[key]), 1), slot.module.matrix
                parts = share_rows(matrix, size).values() if matrix else [size]
                rows = torch.cat([number_rows(m) for m, _ in parts])
                swapped = matrix and matrix.is_swapped((slot.form.out, slot.form.inputs))
                rows = rows.roll(len(rows) // 2, 0) if swapped else rows
                tensors[key] = rows.reshape(tensors[key].shape)
    return tensors


def list_cases(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files of a folder.

    LoRAs also as differences of whole weights, which take no memory, and with the name that PEFT
    gives an adapter in memory (`to_q.lora_A.default.weight`).
    """
    for file in sorted(folder.glob("*.safetensors")):
        yield file.name, (tensors := load_file(file))
        if "-lora-" in file.name and "-without-" not in file.name:
            slots = parse_contents(Lora.open(tensors)).slots
            if any(".lora_A." in key for key in tensors):
                named = {
                    re.sub(r"(\.lora_[AB])\.", r"\1.default.", k): x for k, x in tensors.items()
                }
                yield f"{file.name} with an adapter's name", named
            paths = {split_key(next(iter(slot.keys.values())))[0]: slot.form for slot in slots}
            one = torch.ones(1, 1)
            yield (
                f"{file.name} as differences",
                {f"{path}.diff": one.expand(form.out, form.inputs) for path, form in paths.items()},
            )


def compare_files(open_program: Open, program: str, folder: Path) -> list[str]:
    """Kinds that a program reads whole in every file of which it reads a plain LoRA whole.

    Prints each file of which it takes another number of updates than `check` says.
    """
    reads: dict[str, Read | None] = {}
    tried: dict[str, set[tuple[str, str]]] = {}  # kind -> families and formats
    wholes: dict[str, set[tuple[str, str]]] = {}  # those that are read whole
    counts = {True: 0, False: 0}
    for file, tensors in list_cases(folder):
        found, slots = check(tensors, program=program), parse_contents(Lora.open(tensors)).slots
        family = known_families().get(found.family or "")
        if family is None:
            continue
        if family.id not in reads:
            try:
                reads[family.id] = open_program(family, family.layouts[0])
            except PROGRAM_ERRORS:  # an older version has another such model
                reads[family.id] = None
        if (read := reads[family.id]) is None:
            continue
        keys = {name: [*slot.keys.values()] for slot in slots for name in slot.module.modules}
        try:
            taken = read(number_parts(dict(tensors), slots), keys)
        except PROGRAM_ERRORS:
            taken = set()
        took, every = sum(set(of) <= taken for of in keys.values()), len(keys)
        place, (kind, *_) = (family.id, found.format), found.algorithms
        kind = NAMED if any(map(find_adapter_name, tensors)) else kind
        tried.setdefault(kind, set()).add(place)
        if took == every:
            wholes.setdefault(kind, set()).add(place)
        told = found.readers.part if found.skipped else ()
        if found.program in found.readers.whole + found.readers.none + told:
            reaches = found.program not in found.readers.none
            said = (every - sum((found.skipped or {}).values())) * reaches
            counts[said == took] += 1
            if said != took:
                print(f"{file}: {said} of {every}, and the program takes {took}", flush=True)
    print(f"{counts[True]} files alike, {counts[False]} not", flush=True)
    fair = {kind: of & wholes.get("lora", set()) for kind, of in tried.items()}
    return sorted(kind for kind, of in fair.items() if of and of <= wholes.get(kind, set()))


def describe_checkout(checkout: Path) -> str:
    """Commit and date of a checkout that is a repository of git; "" if it is none."""
    if not (checkout / ".git").exists():
        return ""
    show = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()


def tabulate(
    open_program: Open, families: list[str], tries_text: bool
) -> Iterator[dict[str, object]]:
    """Family -> layout -> row -> counts, longer by one family each time."""
    table: dict[str, object] = {}
    for id_ in families:
        family, sizes = known_families()[id_], {}
        for layout in list_layouts(family):
            read = open_program(family, layout)
            if read is None:
                continue
            rows = {}
            for row in list_rows(family):
                counts = measure(family, layout, read, row)
                text = measure_text(family, layout, read, row) if tries_text else {}
                if counts is not None:
                    counts |= {"text": text} if text else {}
                    rows[row[0]] = counts
            add_further(family, layout, read, rows)
            sizes[layout] = rows
        if sizes:
            table[id_] = sizes
            whole = [
                row
                for row in next(iter(sizes.values()))
                if all(not size[row]["unread"] for size in sizes.values() if row in size)
            ]
            print(f"{id_}: {', '.join(sizes)}; whole: {', '.join(whole) or 'none'}", flush=True)
            yield table


def add_further(family: Family, layout: str, read: Read, rows: dict[str, Any]) -> None:
    """Adds the counts of the spellings that no format of prolora's writes."""
    for row, further in FURTHER.items() if not family.unet else ():
        if row not in rows and (counts := measure_further(family, layout, read, further)):
            rows[row] = counts


def add_further_to(
    open_program: Open, tables: dict[str, Any], families: Collection[str]
) -> Iterator[str]:
    """Adds them to counts that are there; yields the family that is done."""
    for id_ in families or tables:
        for layout, rows in tables[id_].items():
            if layout and (read := open_program(known_families()[id_], layout)):
                add_further(known_families()[id_], layout, read, rows)
        yield id_


Sizes = dict[str, dict[str, dict[str, Any]]]


def summarise(id_: str, sizes: Sizes) -> dict[str, object]:
    """Row -> what a program does not read of a family, over all sizes that were tried.

    `[]` is read whole, `["*"]` is nothing, None not whole by an amount that nobody counted.
    """
    family, rows = loaded_families()[id_], {}
    tried = [layout for layout in sizes if layout]

    def list_patterns(layouts: Iterable[str]) -> set[str]:
        return {str(family.find_pattern(n)) for one in layouts for n in list_linear(id_, one)}

    absent = list_patterns(family.layouts) - list_patterns(tried) if tried else set()
    for row in dict.fromkeys(row for counts in sizes.values() for row in counts):
        of = [counts[row] for counts in sizes.values() if row in counts]
        if any(counts["unread"] is None for counts in of):
            rows[row] = None
        elif all(counts["unread"] == ["*"] for counts in of):
            rows[row] = ["*"]
        else:
            nothing = [one for one in sizes if sizes[one].get(row, {}).get("unread") == ["*"]]
            something = [one for one in tried if one not in nothing]
            unread = {p for counts in of for p in counts["unread"] if p != "*"}
            lost = absent | (list_patterns(nothing) - list_patterns(something))
            variant = FURTHER[row][1] if row in FURTHER else "diffusers"
            if variant not in ("diffusers", "authors"):  # patterns of names in files
                entries = family.list_variant(variant).items()
                lost = {name for name, entry in entries if lost.intersection(entry.parts)}
            unread |= lost
            unread |= {f"+{p}" for counts in of for p in counts.get("needs", ())}
            stops = any(counts.get("stops") for counts in of)
            rows[row] = sorted(unread) if not stops else ["!", *sorted(unread)]
    return rows


def make_table(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What prolora knows of programs, from the counts."""
    programs = {
        id_: {key: facts[key] for key in ("title", "version", "kinds") if key in facts}
        for id_, facts in raw.items()
    }
    families: dict[str, Any] = {}
    for program, facts in raw.items():
        for id_, sizes in split_groups(facts["families"]):
            of = families.setdefault(id_, {"": []})
            of[""].append(program)
            changed = {
                layout: {r + loaders.ALPHA: x["alpha"] for r, x in rows.items() if "alpha" in x}
                for layout, rows in sizes.items()
            }
            for row, unread in (summarise(id_, sizes) | summarise(id_, changed)).items():
                if unread is None:
                    unread = ["?"]
                elif len(unread) > MOST_LISTED:
                    unread = ["!"] if "!" in unread else shorten(unread, id_)
                if unread != ["*"] or row in FURTHER or "," in row or row.endswith(loaders.ALPHA):
                    of.setdefault(row, {})[program] = unread
                read: dict[str, bool] = {}
                for counts in sizes.values():
                    for one, ok in counts.get(row, {}).get("text", {}).items():
                        read[one] = read.get(one, True) and ok
                if read:
                    of.setdefault(row + loaders.TEXT, {})[program] = dict(sorted(read.items()))
    return {"programs": programs, "rows": EVERYONES, "families": drop_idle_rows(families)}


def shorten(unread: Collection[str], id_: str) -> list[str] | None:
    """Joins the patterns of a UNet that end alike, if none of them is read: "*.attn1.to_q".

    None if more than `MOST_LISTED` remain.
    """
    family = loaded_families()[id_]
    listed = {p for one in family.layouts for p in map(family.find_pattern, list_linear(id_, one))}
    alike: dict[str, set[str]] = {}
    for pattern in {*unread, *filter(None, listed)}:
        alike.setdefault(re.sub(r"^.*\.\d+\.(?=[a-z])", "*.", pattern), set()).add(pattern)
    whole = {end: of for end, of in alike.items() if end.startswith("*.") and of <= {*unread}}
    rest = sorted({*whole, *unread}.difference(*whole.values()))
    return rest if len(rest) <= MOST_LISTED else None


def split_groups(families: Mapping[str, Sizes]) -> Iterator[tuple[str, Sizes]]:
    """The counts of every family, then of its groups of sizes that programs tell apart."""
    for id_, sizes in families.items():
        yield id_, sizes
        for group in known_families()[id_].as_loaded if known_families()[id_].groups else ():
            if tried := {size: rows for size, rows in sizes.items() if size in group.layouts}:
                yield group.id, tried


def drop_idle_rows(families: dict[str, Any]) -> dict[str, Any]:
    """The families in order, without rows that all programs were tried with and none reads."""
    kept = {}
    for id_, family in loaded_families().items():
        if id_ in families:
            own = {loaders.name_row(family, f, one) for f, one in family.spellings.items()}
            rows = families[id_]
            kept[id_] = {
                row: of
                for row, of in rows.items()
                if not row
                or (one := row.removesuffix(loaders.TEXT).removesuffix(loaders.ALPHA)) in own
                or one in FURTHER
                or any(unread != ["*"] for unread in rows.get(one, {}).values())
            }
    return kept


def format_table(table: dict[str, Any]) -> str:
    """The table as JSON with a line for every row of a family."""

    def dump(value: object) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    programs = ",\n".join(f"  {dump(id_)}:{dump(of)}" for id_, of in table["programs"].items())
    families = ",\n".join(
        f" {dump(id_)}:{{\n"
        + ",\n".join(f"  {dump(row)}:{dump(of)}" for row, of in rows.items())
        + "}"
        for id_, rows in table["families"].items()
    )
    rows = dump(table["rows"])
    return f'{{"programs":{{\n{programs}}},\n"rows":{rows},\n"families":{{\n{families}}}}}\n'


def main() -> None:
    """Reads the arguments, runs the program's code, writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=[*PROGRAMS, "table"])
    parser.add_argument("checkout", type=Path, nargs="?")
    parser.add_argument("--version", default="", help="what the program calls this version")
    parser.add_argument("--families", nargs="*", default=[])
    parser.add_argument("--alpha", action="store_true", help="add what alphas change")
    parser.add_argument("--text", action="store_true", help="count text encoders anew")
    parser.add_argument("--others", action="store_true", help="count rows that are new")
    parser.add_argument("--further", action="store_true", help="add what trainers alone write")
    parser.add_argument("--files", type=Path, help="what docs/make_conformance.py wrote")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    raw = json.loads(arguments.json.read_text("utf-8")) if arguments.json.exists() else {}
    if arguments.program == "table":
        TABLE.write_text(format_table(make_table(raw)), "utf-8")
        return
    logging.disable(logging.WARNING)
    # Files in spellings that no program is known to read are what this measures.
    loaders.is_read = lambda family, spelling: True
    sys.argv = sys.argv[:1]
    program = PROGRAMS[arguments.program]
    open_program = program.open(arguments.checkout.resolve())
    WHOLE.update(filter(program.counts_blocks, known_families()))
    version = ", ".join(filter(None, [arguments.version, describe_checkout(arguments.checkout)]))
    if arguments.files:
        kinds = compare_files(open_program, arguments.program, arguments.files)
        raw[arguments.program]["kinds"] = kinds
    elif arguments.further:
        tables = raw[arguments.program]["families"]
        raw[arguments.program]["version of further rows"] = version
        for id_ in add_further_to(open_program, tables, arguments.families):
            print(id_, flush=True)
            arguments.json.write_text(format_counts(raw), "utf-8")
    elif arguments.text:
        add_text(open_program, raw[arguments.program]["families"], arguments.families)
    elif arguments.others:
        add_others(open_program, raw[arguments.program]["families"], arguments.families)
    elif arguments.alpha:
        tables = raw[arguments.program]["families"]
        add_alphas(open_program, tables, arguments.families)
    else:
        before = raw.get(arguments.program, {}).get("families", {}) if arguments.families else {}
        facts = raw.setdefault(arguments.program, {})
        facts |= {"title": program.title, "version": version, "how": "run", "families": before}
        families = arguments.families or list(known_families())
        for table in tabulate(open_program, families, program.reads_text):
            facts["families"] = {**before, **table}
            arguments.json.write_text(format_counts(raw), "utf-8")
    arguments.json.write_text(format_counts(raw), "utf-8")


def format_counts(raw: Mapping[str, Any]) -> str:
    """The counts as JSON with a line for every row."""
    text = json.dumps(raw, indent=1, ensure_ascii=False)
    return re.sub(r"\n {6,}\s*", "", text) + "\n"


if __name__ == "__main__":
    main()
