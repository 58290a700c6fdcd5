"""The keys of LoRAs as trainers write them, by the trainers' own code: a file for each trainer.

    python bench/trainer_files/write.py TRAINER CHECKOUT [--version V]

CHECKOUT is a folder with the trainer's source; nothing of it is kept. Each trainer's module has
`list_cells(checkout)`, which yields a `Cell` for every model that the trainer can make a LoRA of.
write.py stores them in bench/results/trainers/TRAINER.json, and bench/loader_matrix.py reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results/trainers"
RANK = 4
Shape = tuple[int, ...]
How = Literal["network class", "key list", "not obtainable"]


@dataclass(frozen=True)
class Cell:
    """The LoRA that one trainer writes for one model.

    Attributes:
        model: the trainer's own name of the model, for example "hunyuan_video_1_5".
        family: the id of the family in prolora, for example "hunyuan-video-1.5"; "" if it has none.
        layout: the id of the published size in prolora, likewise.
        how: "network class": the trainer's class of networks was applied to its class of the model;
            "key list": the trainer's code has the names, or makes them without a model; "not
            obtainable": `note` has the reason.
        note: the classes or the function that were used, or the reason.
        modules: path in the file -> shape of the weight [out, in, ...]. The path has no suffix, for
            example "lora_unet_blocks_0_attn_qkv".
        suffixes: of each module's keys, in the order down, up, alpha if there is one. For example
            (".lora_down.weight", ".lora_up.weight", ".alpha").
        metadata: what the file's header says about the model, for example `ss_base_model_version`.
        others: the modules whose keys end in `other_suffixes`, if a file has keys of two kinds.
    """

    model: str
    family: str
    layout: str
    how: How
    note: str
    modules: Mapping[str, Shape] = field(default_factory=dict)
    suffixes: tuple[str, ...] = (".lora_down.weight", ".lora_up.weight", ".alpha")
    metadata: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Shape] = field(default_factory=dict)
    other_suffixes: tuple[str, ...] = ()

    def make_tensors(self, rank: int = RANK) -> dict[str, Tensor]:
        """Returns the tensors of the file, all ones; a small module has a lower rank."""
        tensors = {}
        for modules, suffixes in (
            (self.modules, self.suffixes),
            (self.others, self.other_suffixes),
        ):
            for path, (out, *inputs) in modules.items():
                own = min(rank, out, torch.Size(inputs).numel())
                down = torch.ones(own, *inputs)
                up = torch.ones(out, own, *([1] * (len(inputs) - 1)))
                made = (down, up, torch.tensor(float(own)))
                for suffix, tensor in zip(suffixes, made, strict=False):
                    tensors[path + suffix] = tensor
        return tensors


KINDS = (
    (".lora_A.weight", ".lora_B.weight", ".alpha"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight", ".alpha"),
    (".lora.down.weight", ".lora.up.weight", ".alpha"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
"""The suffixes of keys, in the order down, up, alpha."""


def find_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of a `Cell` that describe the keys of a file.

    Raises:
        ValueError: its keys are of no kind in `KINDS`, or of more than two.
    """
    if not state:
        raise ValueError("the file would have no keys")
    rest = dict(state)
    kinds: list[tuple[dict[str, Shape], tuple[str, ...]]] = []
    for suffixes in KINDS:
        down, up = suffixes[:2]
        paths = [key.removesuffix(down) for key in rest if key.endswith(down)]
        paths = [path for path in paths if all(path + end in rest for end in suffixes)]
        modules = {path: (len(rest[path + up]), *rest[path + down].shape[1:]) for path in paths}
        if modules:
            kinds.append((modules, suffixes))
        for path in paths:
            for end in suffixes:
                del rest[path + end]
    if rest or not 0 < len(kinds) < 3:
        raise ValueError(f"unexpected keys: {sorted(rest)[:5]}")
    fields: dict[str, Any] = {"modules": kinds[0][0], "suffixes": kinds[0][1]}
    if len(kinds) == 2:
        fields |= {"others": kinds[1][0], "other_suffixes": kinds[1][1]}
    return fields


def write_cells(trainer: str, version: str, cells: Iterable[Cell]) -> None:
    """Stores the cells of a trainer, in place of those that were there."""
    rows = [
        asdict(cell) | {"modules": fold_modules(cell.modules), "others": fold_modules(cell.others)}
        for cell in cells
    ]
    for row in rows:
        if not row["others"]:
            del row["others"], row["other_suffixes"]
    lines = ",\n".join(
        "  " + json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows
    )
    RESULTS.mkdir(exist_ok=True)
    text = f'{{"version": {json.dumps(version)}, "cells": [\n{lines}\n]}}\n'
    (RESULTS / f"{trainer}.json").write_text(text, "utf-8")


def read_cells(trainer: str) -> tuple[str, list[Cell]]:
    """Returns the version of a trainer and its cells."""
    stored = json.loads((RESULTS / f"{trainer}.json").read_text("utf-8"))
    cells = []
    for row in stored["cells"]:
        for field_ in ("modules", "others"):
            row[field_] = unfold_modules(row.get(field_, ()))
        for field_ in ("suffixes", "other_suffixes"):
            row[field_] = tuple(row.get(field_, ()))
        cells.append(Cell(**row))
    return stored["version"], cells


def fold_modules(modules: Mapping[str, Shape]) -> list[list[Any]]:
    """Writes paths that differ in numbers once: [pattern, shape, [numbers of each path]].

    For example {"blocks.0.q": (8, 8), "blocks.1.q": (8, 8)} -> [["blocks.#.q", [8, 8], "0 1"]].
    """
    folded: dict[tuple[str, Shape], list[str]] = {}
    for path, shape in modules.items():
        numbers = re.findall(r"\d+", path)
        pattern = re.sub(r"\d+", "#", path)
        folded.setdefault((pattern, tuple(shape)), []).append(",".join(numbers))
    return [[pattern, list(shape), " ".join(of)] for (pattern, shape), of in folded.items()]


def unfold_modules(folded: Iterable[tuple[str, list[int], str]]) -> dict[str, Shape]:
    """Undoes `fold_modules`, apart from the order."""
    modules = {}
    for pattern, shape, of in folded:
        for numbers in of.split(" "):
            each = iter(numbers.split(","))
            modules[re.sub("#", lambda _, each=each: next(each), pattern)] = tuple(shape)
    return modules
