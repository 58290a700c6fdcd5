"""Regular expressions without an end, in the tables of a PEFT folder and of a header."""

from __future__ import annotations

import json
from itertools import product

from hostile_places import bases, write_everything
from safetensors.torch import load_file, save_file
from sandbox import Box, Row, Words

PATTERNS = ("(\\w|.)+#", "(a|a)*b", "((a+)+)+$", "(.*)*x", "[", "(?P<x", "*", "to_q" * 2000, "\\")
PATTERNS += ("(?<=x{1,9})y", "^(([a-z])+.)+[A-Z]([a-z])+$")
TABLES, PLACES = ("rank_pattern", "alpha_pattern", "target_modules"), ("folder", "header")


def run_patterns(box: Box, row: Row) -> None:
    template = box.fill(write_everything)
    for table, pattern, place in product(TABLES, PATTERNS, PLACES):
        if not row.wants(table, pattern, place):
            continue
        box.begin(template)
        lora = box.inputs / "peft"
        path = lora / "adapter_config.json"
        config = json.loads(path.read_text())
        config[table] = pattern if table == "target_modules" else {pattern: 4}
        if place == "folder":
            path.write_text(json.dumps(config))
        else:
            tensors = load_file(lora / "adapter_model.safetensors")
            stored = {k.replace("base_model.model.", "unet."): t for k, t in tensors.items()}
            lora = box.inputs / "diffusers.safetensors"
            note = json.dumps({f"unet.{key}": value for key, value in config.items()})
            save_file(stored, lora, {"lora_adapter_metadata": note})
        out = box.out / ("p" if place == "folder" else "p.safetensors")
        move: Words = ["transfer", lora, *bases(box), "-o", out, "--cache=none"]
        for words in (move, ["check", lora]):
            how = f"{table} {pattern[:30]!r} in the {place}: {words[0]}"
            box.attack(row, words, how, seconds=6)


CASES = {"patterns of PEFT": run_patterns}
