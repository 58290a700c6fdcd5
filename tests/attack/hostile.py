"""Files made to harm, wherever prolora reads one.

Nothing in them may run, nothing may be written beside the results, and every command ends soon,
within bounded memory, with a sentence. `CONTENTS` are written under the name of every input in turn
(`PLACES`); names that lead elsewhere stand in otherwise sound files.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import damage
import fleet_files
import mini
import torch
from safetensors.torch import load_file, save_file
from sandbox import Box, Row, choose, judge_ending

Maker = Callable[[Path, Box], None]
Words = list[object]


class Runs:
    """What makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        """Takes the file."""
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle calls."""
        return open, (self.canary, "w")


def raw(header: bytes | object, size: int = 0, length: int | None = None) -> Maker:
    """A safetensors file of a header, and a hole of that many bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def make(path: Path, _: Box) -> None:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text) if length is None else length) + text)
            file.truncate(8 + len(text) + size)

    return make


def text(content: str | bytes) -> Maker:
    """A file of a text."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda path, _: path.write_bytes(data) and None


def link(aim: str) -> Maker:
    """A symbolic link."""
    return lambda path, _: path.symlink_to(aim)


def link_to_others(name: str) -> Maker:
    """A link to what somebody else has; inside the box, since what is attacked may write there."""

    def make(path: Path, box: Box) -> None:
        others = box.root / "others"
        others.mkdir(exist_ok=True)
        (others / "notes.txt").write_text("somebody's\n")
        path.symlink_to(others / name)

    return make


def entry(shape: list[int], stop: int, dtype: str = "F32") -> dict[str, object]:
    """A tensor of a header, from the first byte on."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}


def write_zip_pickle(path: Path, box: Box) -> None:
    """As torch.save writes it."""
    torch.save({"weight": Runs(box.canary)}, path)


def write_zip_bomb(path: Path, _: Box) -> None:
    """A kilobyte that says it is a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 26))


def write_socket(path: Path, _: Box) -> None:
    """A socket that nobody reads."""
    here = os.getcwd()
    os.chdir(path.parent)  # its whole path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def write_sparse(path: Path, _: Box) -> None:
    """A hundred gigabytes of nothing."""
    with open(path, "wb") as file:
        file.truncate(100 << 30)


def write_gguf(tensors: int, keys: int, name: int) -> Maker:
    """A GGUF file that promises more than it has."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + struct.pack("<Q", name) + b"x" * 64
    return text(head)


KEY = "lora_unet_" + mini.BLOCK.format(0, "attn1.to_q").replace(".", "_")
TWICE = f'{{"{KEY}.alpha":{json.dumps(entry([], 4))},"{KEY}.alpha":{json.dumps(entry([1], 4))}}}'
DEEP = 100_000
CONTENTS: dict[str, Maker] = {
    "pickle": lambda path, box: path.write_bytes(pickle.dumps(Runs(box.canary), 2)) and None,
    "pickle, latest": lambda path, box: path.write_bytes(pickle.dumps(Runs(box.canary))) and None,
    "torch.save": write_zip_pickle,
    "zip bomb": write_zip_bomb,
    "header of 2^62 bytes": raw(b"{}", length=1 << 62),
    "header of a terabyte": raw(b"{}", length=1 << 40),
    "header of brackets": raw(b'{"a":[' + b"[]," * (1 << 20) + b"0]}"),
    "deep header": raw(b'{"a":' * DEEP),
    "deep metadata": raw({"__metadata__": {"lora_adapter_metadata": "[" * DEEP}}),
    "deep JSON": text("[" * DEEP),
    "deep JSON, closed": text('{"a":' * DEEP + "1" + "}" * DEEP),
    "shape 2^62": raw({f"{KEY}.lora_up.weight": entry([1 << 62, 4], 96)}, 96),
    "shape -1": raw({f"{KEY}.lora_up.weight": entry([-1, 4], 96)}, 96),
    "shape 0": raw({f"{KEY}.lora_{n}.weight": entry([0, 0], 0) for n in ("up", "down")}),
    "no shape": raw({f"{KEY}.lora_{n}.weight": entry([], 4) for n in ("up", "down")}, 4),
    "offsets of a terabyte": raw({f"{KEY}.lora_up.weight": entry([1 << 20, 1 << 18], 1 << 40)}, 96),
    "key twice": raw(TWICE.encode(), 4),
    "30,000 tensors": raw({f"x{i}.lora_up.weight": entry([0], 0) for i in range(30_000)}),
    "number of 5,000 digits": text('{"r": ' + "9" * 5000 + ', "prolora_plan": 1}'),
    "NaN and Infinity": text('{"r": NaN, "lora_alpha": Infinity, "prolora_plan": 1e999}'),
    "half characters": text('{"\\ud800": "\\udfff", "prolora_plan": "\\ud800"}'),
    "UTF-16": text("{}".encode("utf-16")),
    "byte order mark": text("\ufeff{}"),
    "control characters": text('{"\\u001b[31m\\u0007": "\\u0000\\u009b2J", "prolora_plan": 1}'),
    "list": text("[1, 2, 3]"),
    "number": text("7"),
    "empty": text(b""),
    "zeros": text(b"\0" * 65536),
    "noise": lambda path, _: path.write_bytes(Random(0).randbytes(65536)) and None,
    "a line of 64 MB": lambda path, _: path.write_bytes(b"x" * (64 << 20)) and None,
    "web page": text("<html><script>alert(1)</script></html>"),
    "GGUF of 2^60 tensors": write_gguf(1 << 60, 0, 4),
    "GGUF of 2^60 keys": write_gguf(1, 1 << 60, 4),
    "GGUF, name of 2^60": write_gguf(1, 0, 1 << 60),
    "sparse, 100 GB": write_sparse,
    "folder": lambda path, _: path.mkdir(),
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": write_socket,
    "link to itself": link("itself"),
    "link to nothing": link_to_others("nothing/at/all"),
    "link to /dev/zero": link("/dev/zero"),
    "link to /dev/full": link("/dev/full"),
    "link to somebody's file": link_to_others("notes.txt"),
    "link to a folder": link_to_others(""),
}


def make(content: str, path: Path, box: Box) -> None:
    """Puts a content in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == "link to itself":
        path.symlink_to(path.name)
    else:
        CONTENTS[content](path, box)


def bases(box: Box) -> Words:
    return ["--source", box.inputs / "source", "--target", box.inputs / "target"]


def move(box: Box, name: str = "lora.safetensors", *more: object, verb: str = "transfer") -> Words:
    """A transfer of a file of the inputs, or a fit."""
    return [verb, box.inputs / name, *bases(box), "-o", box.out / "x.safetensors", *more]


def write_everything(box: Box) -> None:
    """A LoRA, a PEFT folder, two bases, a collection of which one half is done, a filled cache."""
    damage.write_peft(box)
    loras = box.inputs / "loras"
    loras.mkdir()
    for name in "ab":
        save_file(fleet_files.some_tensors(2, 12), loras / f"{name}.safetensors")
    box.must("migrate", loras / "a.safetensors", *carry_on(box)[0][2:])
    box.must(*move(box), "--method", "prolora", "--rank", "4", "--cache", box.cache)
    (box.out / "x.safetensors").unlink()


def place(name: str) -> Callable[[Box], Path]:
    """A file of the box, the first that a pattern finds."""

    def find(box: Box) -> Path:
        return next(iter(sorted(box.root.glob(name))), box.root / name)

    return find


def instead(name: str) -> Callable[[Box], Path]:
    """A file in the place of the weights of the source, which are elsewhere then."""

    def find(box: Box) -> Path:
        weights = box.inputs / "source" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
        return weights.with_name(name)

    return find


def use_cache(box: Box) -> list[Words]:
    moved = move(box, "lora.safetensors", "--method", "prolora", "--rank", "4")
    return [[*moved, "--cache", box.cache]]


def carry_on(box: Box, loras: object = "") -> list[Words]:
    words = [*bases(box), "-o", box.out / "m", "--cache=none"]
    return [["migrate", loras or box.inputs / "loras", *words]]


def probe(box: Box) -> list[Words]:
    return [move(box, "lora.safetensors", *damage.FIT, "--cache=none", verb="fit")]


def quick(box: Box, *more: object) -> Words:
    return move(box, "lora.safetensors", "--cache=none", "--method", "copy", *more)


PLACES: dict[str, tuple[Callable[[Box], Path], Callable[[Box], list[Words]]]] = {
    "LoRA": (
        place("in/lora.safetensors"),
        lambda box: [quick(box), ["check", box.inputs / "lora.safetensors"]],
    ),
    "LoRA, old suffix": (
        place("in/lora.ckpt"),
        lambda box: [move(box, "lora.ckpt"), ["check", box.inputs / "lora.ckpt"]],
    ),
    "PEFT configuration": (
        place("in/peft/adapter_config.json"),
        lambda box: [
            ["check", box.inputs / "peft"],
            ["transfer", box.inputs / "peft", *bases(box), "-o", box.out / "p"],
        ],
    ),
    "PEFT weights": (
        place("in/peft/adapter_model.safetensors"),
        lambda box: [["transfer", box.inputs / "peft", *bases(box), "-o", box.out / "p"]],
    ),
    "source": (
        place("in/source/diffusion_pytorch_model.safetensors"),
        lambda box: [quick(box), ["check", box.inputs / "lora.safetensors", *bases(box)]],
    ),
    "source, old suffix": (
        instead("diffusion_pytorch_model.bin"),
        lambda box: [quick(box)],
    ),
    "configuration of the target": (place("in/target/config.json"), lambda box: [quick(box)]),
    "index of shards": (
        instead("diffusion_pytorch_model.safetensors.index.json"),
        lambda box: [quick(box)],
    ),
    "map": (
        place("in/map.json"),
        lambda box: [quick(box, "--match", box.inputs / "map.json")],
    ),
    "prompts": (
        place("in/prompts.txt"),
        lambda box: [
            move(
                box,
                "lora.safetensors",
                *damage.FIT,
                *("--prompts", box.inputs / "prompts.txt"),
                verb="fit",
            )
        ],
    ),
    "model_index.json": (place("in/source/model_index.json"), probe),
    "list of LoRAs": (
        place("in/list.txt"),
        lambda box: carry_on(box, box.inputs / "list.txt"),
    ),
    "LoRA of a collection": (place("in/loras/c.safetensors"), carry_on),
    "result of a collection": (place("out/m/target/*.safetensors"), carry_on),
    "note of a migration": (place("out/m/target/*.failed.json"), carry_on),
    "output": (place("out/x.safetensors"), lambda box: [quick(box)]),
    "report": (
        place("out/report.json"),
        lambda box: [quick(box, "--report", box.out / "report.json")],
    ),
    "card": (place("out/README.md"), lambda box: [quick(box, "--card")]),
    "subspaces": (place("cache/bases/*.safetensors"), use_cache),
    "pair in the cache": (place("cache/tables/*.json"), use_cache),
}


def run_place(name: str, box: Box, scale: float, seed: int) -> Row:
    """Every content in one place; a scale below 1 takes some of them."""
    row = Row("hostile", name)
    box.begin()
    write_everything(box)
    template = box.keep()
    find, commands = PLACES[name]
    for content in CONTENTS:
        if choose(seed, name, content).random() >= scale:
            continue
        box.begin(template)
        make(content, find(box), box)
        before = box.look()
        for words in commands(box):
            run = box.run(*words)
            verdicts = judge_ending(box, run, before)
            done = "done" if run.code == 0 else "refused"
            row.add(verdicts or [done], f"{content}: {' '.join(map(str, words[:2]))}", run)
    return row


# --- names that lead elsewhere ---------------------------------------------------------------

NAMES = (
    "../../victim",
    "{box}/victim",
    "..",
    ".",
    "a/../../b",
    "a\\..\\b",
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "a\rb",
    "\u202egnp",
    "\u2028",
    "a\x9b2Jb",
    "[bold]x[/bold]",
    "<script>alert(1)</script>",
    "x" * 5000,
    "%s%n{0}",
    "$(touch canary)",
    "`touch canary`",
    "con",
    "",
    " ",
    "\ud800",
)


def list_named(box: Box) -> Iterator[tuple[str, Callable[[str], list[Words]]]]:
    """What a name can be of: what it is, and the commands for a name."""
    lora, source = box.inputs / "lora.safetensors", box.inputs / "source"

    def rename_tensor(name: str) -> list[Words]:
        tensors = load_file(lora)
        tensors[f"{name}.lora_up.weight"] = tensors.pop(f"{KEY}.lora_up.weight")
        tensors[f"{name}.lora_down.weight"] = tensors.pop(f"{KEY}.lora_down.weight")
        save_file(tensors, lora)
        return [quick(box), ["check", lora]]

    def write_metadata(name: str) -> list[Words]:
        keys = ("modelspec.title", "ss_output_name", "ss_sd_model_name", "modelspec.license")
        keys = (*keys, "modelspec.trigger_phrase", "prolora.target", name or "key")
        save_file(load_file(lora), lora, dict.fromkeys(keys, name))
        page = ("--report", box.out / "page.html", "--card")
        return [["check", lora], quick(box, *page)]

    def name_file(name: str) -> list[Words]:
        other = box.inputs / "loras" / (name.replace("/", "_") + ".safetensors")
        lora.rename(other)
        loras = [box.inputs / "loras" / "a.safetensors", other]
        words: Words = ["transfer", *loras, *bases(box), "-o", box.out / "many", "--cache=none"]
        return [[*words, "--card"], *carry_on(box)]

    def name_base(name: str) -> list[Words]:
        other = source.with_name(name.replace("/", "_") or "base")
        source.rename(other)
        words: Words = ["--source", other, "--target", box.inputs / "target", "--cache=none"]
        move: Words = ["transfer", lora, *words, "-o", box.out / "y.safetensors", "--card"]
        return [move, ["migrate", lora, *words, "-o", box.out / "q"]]

    def name_shard(name: str) -> list[Words]:
        index = source / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {f"{n}.weight": name for n in mini.shapes(3)}}))
        (source / "diffusion_pytorch_model.safetensors").rename(source / "shard.safetensors")
        return [quick(box)]

    yield "tensor", rename_tensor
    yield "metadata", write_metadata
    yield "file of a LoRA", name_file
    yield "folder of a base", name_base
    yield "shard in an index", name_shard


def run_names(box: Box, scale: float, seed: int) -> Row:
    """Every name for everything that has one."""
    row = Row("hostile", "names that lead elsewhere")
    box.begin()
    write_everything(box)
    template = box.keep()
    for what, rename in list(list_named(box)):
        for pattern in NAMES:
            name = pattern.replace("{box}", str(box.root))
            if choose(seed, what, pattern).random() >= scale:
                continue
            box.begin(template)
            try:
                commands = rename(name)
            except (OSError, ValueError, UnicodeError):
                continue  # no file can be called so
            except Exception as error:
                if "surrogates" in str(error) or isinstance(error, KeyError):
                    continue
                raise
            for words in commands:
                # A migration writes into the folder that it is given, others beside it too.
                folder = words[words.index("-o") + 1] if words[0] == "migrate" else None
                before = box.look(folder)
                run = box.run(*words)
                verdicts = judge_ending(box, run, before, folder)
                done = "done" if run.code == 0 else "refused"
                row.add(verdicts or [done], f"{what} {name!r:.40}: {words[0]}", run)
    return row


# --- patterns and pickles in whole files ------------------------------------------------------

PATTERNS = (
    "(\\w|.)+#",
    "(a|a)*b",
    "((a+)+)+$",
    "(.*)*x",
    "[",
    "(?P<x",
    "*",
    "to_q" * 2000,
    "\\",
    "(?<=x{1,9})y",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
)


def run_patterns(box: Box, scale: float, seed: int) -> Row:
    """Regular expressions in the tables of a PEFT folder, and in the header of a file."""
    row = Row("hostile", "patterns of PEFT")
    box.begin()
    write_everything(box)
    template = box.keep()
    for table in ("rank_pattern", "alpha_pattern", "target_modules"):
        for pattern in PATTERNS:
            for place in ("folder", "header"):
                if choose(seed, table, pattern, place).random() >= scale:
                    continue
                box.begin(template)
                folder = box.inputs / "peft"
                path = folder / "adapter_config.json"
                config = json.loads(path.read_text())
                config[table] = pattern if table == "target_modules" else {pattern: 4}
                lora: Path = folder
                if place == "folder":
                    path.write_text(json.dumps(config))
                else:
                    lora = box.inputs / "diffusers.safetensors"
                    tensors = load_file(folder / "adapter_model.safetensors")
                    stored = {
                        k.replace("base_model.model.", "unet."): t for k, t in tensors.items()
                    }
                    note = {f"unet.{key}": value for key, value in config.items()}
                    save_file(stored, lora, {"lora_adapter_metadata": json.dumps(note)})
                before = box.look()
                out = box.out / ("p" if place == "folder" else "p.safetensors")
                words = ["transfer", lora, *bases(box), "-o", out, "--cache=none"]
                for command in (words, ["check", lora]):
                    run = box.run(*command, seconds=6)
                    verdicts = judge_ending(box, run, before)
                    done = "done" if run.code == 0 else "refused"
                    how = f"{table} {pattern[:30]!r} in the {place}: {command[0]}"
                    row.add(verdicts or [done], how, run)
    return row


def list_cases() -> dict[str, Callable[[Box, float, int], Row]]:
    """Name -> what runs it."""
    places = {name: partial(run_place, name) for name in PLACES}
    return places | {"names that lead elsewhere": run_names, "patterns of PEFT": run_patterns}
