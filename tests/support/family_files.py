"""Files of a family as its authors have them, made from the family's tables and from nothing else.

Every matrix has one column and a value of its own in every row, so that a program that cuts, joins
or swaps rows can be compared with the tables row by row, at the real number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from prolora.architectures.family import AuthorsWeight, Family
from prolora.architectures.layouts import load_layout

Tensors = dict[str, torch.Tensor]
PARAMETERS = {
    "modulation",
    "pos_embed",
    "emb_pos",
    "keyframes_abs_pos_embedding",
    "pos_frequencies",
    "motion_synthesis_weight",
    "padding_tokens",
    "register_tokens",
}
BLOCKS = 64
"""More than any family has, for patterns written out."""


@dataclass(frozen=True)
class AuthorsFile:
    """A file of the authors and what diffusers must make of it."""

    stored: Tensors  # the authors' name -> rows
    expected: Tensors  # canonical module -> rows


def is_parameter(module: str) -> bool:
    """Whether a module is a bare parameter, whose key has no `.weight`."""
    last = module.rpartition(".")[2]
    return "scale_shift_table" in last or last in PARAMETERS


def name_key(module: str) -> str:
    """The key of a module's weight in a checkpoint."""
    return module if is_parameter(module) else f"{module}.weight"


def collect_weights(family: Family, modules: Iterable[str]) -> dict[str, AuthorsWeight]:
    """The authors' weights that hold these canonical modules."""
    held = (family.find_weight_holding(module) for module in modules)
    return {weight.name: weight for weight in held if weight is not None}


def name_authors_weights(family: Family, tensors: Tensors) -> Tensors:
    """Keys of the authors' checkpoint: what is a parameter here is one there, but for one."""
    keys = {}
    for name, rows in tensors.items():
        weight = family.find_weight(name)
        bare = weight is not None and is_parameter(weight.parts[0])
        keys[name if bare and not name.endswith(".direction") else f"{name}.weight"] = rows
    return keys


def make_authors_file(
    family: Family, layout: str, keep: Callable[[str], bool] = lambda module: True
) -> AuthorsFile:
    """The authors' file of a published size, with the canonical modules that `keep` admits."""
    shapes = {name: shape for name, shape in load_layout(layout).shapes.items() if keep(name)}
    stored, expected, start = {}, {}, 0
    for weight in collect_weights(family, shapes).values():
        rows = [shapes[part][0] for part in weight.parts]
        matrix = torch.arange(start, start + sum(rows), dtype=torch.float64)[:, None]
        start += sum(rows)
        stored[weight.name] = matrix
        parts = dict(zip(weight.parts, matrix.split(rows), strict=True))
        if weight.is_swapped(shapes[weight.parts[0]]):
            parts = {name: torch.cat(part.chunk(2)[::-1]) for name, part in parts.items()}
        expected |= parts
    assert set(expected) == set(shapes)
    return AuthorsFile(stored, expected)


def rename_by_aliases(family: Family, tensors: Tensors) -> Tensors:
    """The same matrices under their other names, cut into parts where only parts have one."""
    others = {
        to.replace("N", str(number)): alias.replace("N", str(number))
        for alias, to in family.aliases.items()
        for number in range(BLOCKS if "N" in alias.split(".") else 1)
        if isinstance(to, str)
    }
    renamed: Tensors = {}
    for name, matrix in tensors.items():
        weight = family.find_weight(name)
        assert weight is not None
        if f"{name}.0" in others:
            unit = len(matrix) // sum(weight.shares)
            for i, part in enumerate(matrix.split([unit * share for share in weight.shares])):
                renamed[others[f"{name}.{i}"]] = part
        else:
            renamed[others.get(name, name)] = matrix
    return renamed


def name_weights(tensors: Tensors, prefix: str = "") -> Tensors:
    """Keys of a checkpoint."""
    return {prefix + name_key(name): rows for name, rows in tensors.items()}


def make_lora(
    tensors: Tensors, prefix: str, *, dotted: bool = True, kohya: bool = False
) -> Tensors:
    """A LoRA of rank 1 whose `up` is the rows of each module and whose `down` is 1."""
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    lora: Tensors = {}
    for name, rows in tensors.items():
        module = prefix + (name if dotted else name.replace(".", "_"))
        lora[f"{module}.{down}.weight"] = torch.ones(1, 1, dtype=rows.dtype)
        lora[f"{module}.{up}.weight"] = rows
        if kohya:
            lora[f"{module}.alpha"] = torch.tensor(1.0)
    return lora


def assert_equal_tensors(got: Tensors, expected: Tensors) -> None:
    """The same keys with the same values."""
    assert set(got) == set(expected)
    for name, rows in expected.items():
        assert torch.equal(got[name], rows), name
