"""Names that lead elsewhere, of everything that has a name."""

from __future__ import annotations

import json

import mini
from contents import KEY
from hostile_places import bases, carry_on, quick, write_everything
from safetensors.torch import load_file, save_file
from sandbox import Box, Row, Words

NAMES = (
    *("../../victim", "{box}/victim", "..", ".", "a/../../b", "a\\..\\b", "con", "", " "),
    *("\x1b[31mred\x1b[0m", "a\nb", "a\rb", "\u202egnp", "\u2028", "a\x9b2Jb", "\ud800"),
    *("[bold]x[/bold]", "<script>alert(1)</script>", "x" * 5000, "%s%n{0}"),
    *("$(touch canary)", "`touch canary`"),
)


def rename_tensor(box: Box, name: str) -> list[Words]:
    lora = box.inputs / "lora.safetensors"
    tensors = load_file(lora)
    for role in ("up", "down"):
        tensors[f"{name}.lora_{role}.weight"] = tensors.pop(f"{KEY}.lora_{role}.weight")
    save_file(tensors, lora)
    return [quick(box), ["check", lora]]


def write_metadata(box: Box, name: str) -> list[Words]:
    lora = box.inputs / "lora.safetensors"
    keys = ("modelspec.title", "ss_output_name", "ss_sd_model_name", "modelspec.license")
    keys = (*keys, "modelspec.trigger_phrase", "prolora.target", name or "key")
    save_file(load_file(lora), lora, dict.fromkeys(keys, name))
    return [["check", lora], quick(box, "--report", box.out / "page.html", "--card")]


def name_file(box: Box, name: str) -> list[Words]:
    other = box.inputs / "loras" / (name.replace("/", "_") + ".safetensors")
    (box.inputs / "lora.safetensors").rename(other)
    loras = [box.inputs / "loras" / "a.safetensors", other]
    words: Words = ["transfer", *loras, *bases(box), "-o", box.out / "many", "--cache=none"]
    return [[*words, "--card"], *carry_on(box)]


def name_base(box: Box, name: str) -> list[Words]:
    lora, source = box.inputs / "lora.safetensors", box.inputs / "source"
    other = source.rename(source.with_name(name.replace("/", "_") or "base"))
    words: Words = ["--source", other, "--target", box.inputs / "target", "--cache=none"]
    move: Words = ["transfer", lora, *words, "-o", box.out / "y.safetensors", "--card"]
    return [move, ["migrate", lora, *words, "-o", box.out / "q"]]


def name_shard(box: Box, name: str) -> list[Words]:
    source = box.inputs / "source"
    index = source / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{n}.weight": name for n in mini.shapes(3)}}))
    (source / "diffusion_pytorch_model.safetensors").rename(source / "shard.safetensors")
    return [quick(box)]


NAMED = {
    "tensor": rename_tensor,
    "metadata": write_metadata,
    "file of a LoRA": name_file,
    "folder of a base": name_base,
    "shard in an index": name_shard,
}


def run_names(box: Box, row: Row) -> None:
    template = box.fill(write_everything)
    for what, rename in NAMED.items():
        for pattern in NAMES:
            if not row.wants(what, pattern):
                continue
            box.begin(template)
            try:
                commands = rename(box, pattern.replace("{box}", str(box.root)))
            except (OSError, ValueError, KeyError):
                continue  # nothing can be called so
            except Exception as error:
                if "surrogates" in str(error):
                    continue
                raise
            for words in commands:
                # A migration writes into the folder that it is given, others beside it too.
                folder = words[words.index("-o") + 1] if words[0] == "migrate" else None
                box.attack(row, words, f"{what} {pattern!r:.40}: {words[0]}", results=folder)


CASES = {"names that lead elsewhere": run_names}
