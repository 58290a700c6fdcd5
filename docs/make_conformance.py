"""Makes small LoRAs of every family, kind and spelling: ``python docs/make_conformance.py FOLDER``.

A program that reads LoRAs can be tried with them: each file has one module of every linear layer's
kind that the model has, and each tensor is one small number throughout, other for every tensor. A
file is some hundred kB and packs to 10 kB or less. README.md in FOLDER lists them all. No weight of
anybody's is in them; they are in the public domain (CC0 1.0).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prolora.adapters import Adapter
from prolora.adapters.formats.encoding import encode_adapter
from prolora.adapters.keys.tensor_keys import split_key
from prolora.architectures.families import known_families
from prolora.architectures.family import Family
from prolora.architectures.identify import Model
from prolora.architectures.layouts import UNUSED, load_layout
from prolora.architectures.modules import is_linear
from prolora.checking.check import check
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat

FORMATS = ("kohya", "comfy", "diffusers")
"""Of single files; a PEFT folder has a configuration beside it."""
KINDS = {
    "lora": {"lora_up.weight": "m1", "lora_down.weight": "1n", "alpha": ""},
    "lora-without-alpha": {"lora_up.weight": "m1", "lora_down.weight": "1n"},
    "dora": {"lora_up.weight": "m1", "lora_down.weight": "1n", "dora_scale": "m1", "alpha": ""},
    "loha": {
        "hada_w1_a": "m1",
        "hada_w1_b": "1n",
        "hada_w2_a": "m1",
        "hada_w2_b": "1n",
        "alpha": "",
    },
    "lokr": {"lokr_w1": "22", "lokr_w2_a": "h1", "lokr_w2_b": "1k", "alpha": ""},
    "glora": {
        "a1.weight": "n1",
        "a2.weight": "1n",
        "b1.weight": "m1",
        "b2.weight": "1n",
        "alpha": "",
    },
    "oft": {"oft_blocks": "h22", "alpha": ""},
}
"""Kind -> its tensors, by their sides: m × n is the update, h × k half of it, 1 the rank."""
DOTTED = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}


def choose_modules(family: Family) -> list[str]:
    """Returns a module of every kind; of a U-Net also those that tell its depth."""
    chosen: dict[str, str] = {}
    for name, shape in load_layout(family.layouts[0]).shapes.items():
        if is_linear(name, shape) and not name.startswith(UNUSED):
            tells = family.unet and name.endswith("attn2.to_k")
            chosen.setdefault(name if tells else re.sub(r"\d+", "N", name), name)
    return list(chosen.values())


def list_paths(family: Family, format: str) -> dict[str, tuple[int, int]]:
    """Returns the path of every update in a file, and its size; fused weights as one."""
    shapes = load_layout(family.layouts[0]).shapes
    updates: list[dict[str, LowRank]] = []
    for name in choose_modules(family):
        held = None if family.unet else family.find_weight_holding(name)
        parts = held.parts if held else (name,)
        sizes = {part: shapes[part][:2] for part in parts}
        zeros = {n: LowRank(torch.zeros(m, 1), torch.zeros(1, k)) for n, (m, k) in sizes.items()}
        updates.append(zeros)
    try:
        return _measure_paths(family, format, {n: x for one in updates for n, x in one.items()})
    except UnsupportedFormat:  # it has no name for some of them
        found: dict[str, tuple[int, int]] = {}
        for one in updates:
            with suppress(UnsupportedFormat):
                found |= _measure_paths(family, format, one)
        return found


def _measure_paths(
    family: Family, format: str, updates: dict[str, LowRank]
) -> dict[str, tuple[int, int]]:
    tensors = encode_adapter(Adapter(updates, origin=Model.of(family.id)), format, torch.float16)
    sizes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, role = split_key(key)
        sizes.setdefault(path, {})[role] = tensor
    return {path: (len(of["up"]), of["down"].shape[1]) for path, of in sizes.items()}


def make_file(family: Family, format: str, kind: str) -> dict[str, Tensor]:
    """Returns the tensors of a file."""
    tensors: dict[str, Tensor] = {}
    for path, (m, n) in list_paths(family, format).items():
        sizes = {"m": m, "n": n, "h": m // 2, "k": n // 2, "1": 1, "2": 2}
        if kind in ("lokr", "oft") and (m % 2 or n % 2):
            continue
        for role, letters in KINDS[kind].items():
            end = role if format == "kohya" or kind == "dora" else DOTTED.get(role, role)
            shape = [sizes[letter] for letter in letters]
            number = 0.5 if role == "alpha" else (1 + len(tensors)) * 2.0**-14
            tensors[f"{path}.{end}"] = torch.full(shape, number, dtype=torch.float16)
    return tensors


def list_files() -> Iterator[tuple[str, Family, str, str]]:
    """Yields name, family, format and kind: every LoRA in all formats, other kinds in one."""
    for family in known_families().values():
        formats = [format for format in FORMATS if list_paths(family, format)]
        for i, kind in enumerate(KINDS):
            for format in formats if i < 2 else [formats[i % len(formats)]]:
                yield f"{family.id}-{kind}-{format}.safetensors", family, format, kind


def write_set(folder: Path) -> None:
    """Writes the files, and the page that lists them."""
    rows = []
    for name, family, format, kind in list_files():
        save_file(make_file(family, format, kind), folder / name)
        found = check(folder / name)
        updates = sum(part.updates for part in found.parts.values())
        readers = ", ".join(found.readers.whole) or "–"
        rows.append(f"| {name} | {family.title} | {kind} | {format} | {updates} | {readers} |")
    text = (__doc__ or "").partition("\n\n")[2].replace("FOLDER", "this folder")
    head = "| file | for | kind | names | updates | read whole by |\n|---|---|---|---|---|---|"
    page = "\n".join(["# LoRAs to try a loader with", "", text, head, *rows, ""])
    (folder / "README.md").write_text(page, "utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_set(folder)
