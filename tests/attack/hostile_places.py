"""Every hostile file under the name of every input and result.

Nothing in them may run, nothing may be written beside the results, and every command ends soon,
within bounded memory, with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import fleet_files
from contents import CONTENTS, make
from inputs import FIT, RANK, bases, write_peft
from safetensors.torch import save_file
from sandbox import Box, Row, Words


def move(box: Box, name: str = "lora.safetensors", *more: object, verb: str = "transfer") -> Words:
    return [verb, box.inputs / name, *bases(box), "-o", box.out / "x.safetensors", *more]


def quick(box: Box, *more: object) -> Words:
    return move(box, "lora.safetensors", "--cache=none", "--method", "copy", *more)


def use_cache(box: Box) -> list[Words]:
    return [move(box, "lora.safetensors", *RANK, "--cache", box.cache)]


def carry_on(box: Box, loras: str = "loras") -> list[Words]:
    return [["migrate", box.inputs / loras, *bases(box), "-o", box.out / "m", "--cache=none"]]


def fit(box: Box, *more: object) -> list[Words]:
    return [move(box, "lora.safetensors", *FIT, "--cache=none", *more, verb="fit")]


def move_peft(box: Box) -> Words:
    return ["transfer", box.inputs / "peft", *bases(box), "-o", box.out / "p"]


def write_everything(box: Box) -> None:
    """A LoRA, a PEFT folder, two bases, a collection of which one half is done, a filled cache."""
    write_peft(box)
    (box.inputs / "loras").mkdir()
    for name in "ab":
        lora = fleet_files.some_tensors(2, 12)
        save_file(lora, box.inputs / "loras" / f"{name}.safetensors")
    box.must(*carry_on(box, "loras/a.safetensors")[0])
    box.must(*use_cache(box)[0])
    (box.out / "x.safetensors").unlink()


def instead(name: str) -> Callable[[Box], Path]:
    """A file in the place of the weights of the source, which are elsewhere then."""

    def find(box: Box) -> Path:
        weights = box.inputs / "source" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
        return weights.with_name(name)

    return find


PLACES: dict[str, tuple[str | Callable[[Box], Path], Callable[[Box], list[Words]]]] = {
    "LoRA": (
        "in/lora.safetensors",
        lambda box: [quick(box), ["check", box.inputs / "lora.safetensors"]],
    ),
    "LoRA, old suffix": (
        "in/lora.ckpt",
        lambda box: [move(box, "lora.ckpt"), ["check", box.inputs / "lora.ckpt"]],
    ),
    "PEFT configuration": (
        "in/peft/adapter_config.json",
        lambda box: [["check", box.inputs / "peft"], move_peft(box)],
    ),
    "PEFT weights": ("in/peft/adapter_model.safetensors", lambda box: [move_peft(box)]),
    "source": (
        "in/source/diffusion_pytorch_model.safetensors",
        lambda box: [quick(box), ["check", box.inputs / "lora.safetensors", *bases(box)]],
    ),
    "source, old suffix": (instead("diffusion_pytorch_model.bin"), lambda box: [quick(box)]),
    "configuration of the target": ("in/target/config.json", lambda box: [quick(box)]),
    "index of shards": (
        instead("diffusion_pytorch_model.safetensors.index.json"),
        lambda box: [quick(box)],
    ),
    "map": ("in/map.json", lambda box: [quick(box, "--match", box.inputs / "map.json")]),
    "prompts": (
        "in/prompts.txt",
        lambda box: fit(box, "--prompts", box.inputs / "prompts.txt"),
    ),
    "model_index.json": ("in/source/model_index.json", fit),
    "list of LoRAs": ("in/list.txt", lambda box: carry_on(box, "list.txt")),
    "LoRA of a collection": ("in/loras/c.safetensors", carry_on),
    "result of a collection": ("out/m/target/*.safetensors", carry_on),
    "note of a migration": ("out/m/target/*.failed.json", carry_on),
    "output": ("out/x.safetensors", lambda box: [quick(box)]),
    "report": ("out/report.json", lambda box: [quick(box, "--report", box.out / "report.json")]),
    "card": ("out/README.md", lambda box: [quick(box, "--card")]),
    "subspaces": ("cache/bases/*.safetensors", use_cache),
    "pair in the cache": ("cache/tables/*.json", use_cache),
}


def run_place(name: str, box: Box, row: Row) -> None:
    template = box.fill(write_everything)
    place, commands = PLACES[name]
    for content in CONTENTS:
        # An output that links to a folder is one of LoRAs elsewhere, and they belong into it.
        if not row.wants(name, content) or (name, content) == ("output", "link to a folder"):
            continue
        box.begin(template)
        if isinstance(place, str):
            path = next(iter(sorted(box.root.glob(place))), box.root / place)
        else:
            path = place(box)
        make(content, path, box)
        for words in commands(box):
            box.attack(row, words, f"{content}: {' '.join(map(str, words[:2]))}")


CASES = {name: partial(run_place, name) for name in PLACES}
